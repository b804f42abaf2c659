"""ScaleOT's emulator from (N_a, alpha, beta): harmonizers and selective rank compression."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import nn

from fedsplit.config import OffsiteConfig
from fedsplit.emulators.build import Emulator, build_emulator
from fedsplit.emulators.compression.src import (
    TRUNCATIONS,
    compress_block,
    compressed_numel,
)
from fedsplit.emulators.compression.structure import Model
from fedsplit.emulators.compressors.base import (
    Compressor,
    Forecast,
    Material,
    Sizes,
    adapters_in,
    plain_forecast,
)
from fedsplit.emulators.compressors.distil import Distil, distil
from fedsplit.emulators.compressors.truncation import truncation_roots
from fedsplit.emulators.importance.files import Importance
from fedsplit.emulators.importance.harmonizer import Harmonizer, default_width
from fedsplit.emulators.planning.plan import (
    COMPRESS,
    HARMONIZER,
    KEEP,
    EmulatorPlan,
    check_fraction,
)
from fedsplit.errors import ConfigError, ModelError, check, one_of
from fedsplit.models.anatomy import probe
from fedsplit.models.layout.projections import dense_layout_of
from fedsplit.models.loading import weights_digest

RANKS = ("scores", "costs")


@dataclass(frozen=True)
class ScaleOT(Compressor):
    """ScaleOT (arXiv 2412.09812): one importance run serves emulators of any size.

    Attributes:
        n_adapters: N_a, blocks with the highest scores that become A; 0 with ``adapters``.
        adapters: A's positions instead of the scores' choice.
        alpha: share of the other blocks, least important first, replaced by harmonizers.
        beta: rank reduction of what then remains; 0: kept as it is.
        rank_by: "scores", the importance run's, or "costs", what it measured of each block (ours).
        attention: compress Q, K, V, O (the method's choice).
        ffn: compress the FFN too (to reproduce why not).
        truncation: what rank compression keeps closest: "outputs" of the projections on public
            text (ours; needs tokens), or "weights", as the paper has it.
        settle_steps: steps in which the chosen harmonizers are trained together, in the place they
            now have, before blocks are compressed and shipped: towards the full model's hidden
            states where they enter A, and its next-token distribution (ours, not the paper's; 0:
            off; needs tokens).
        settle_lr: of those steps.
        bf16: autocast while settling.
        seed: of a randomised SVD and of settling.
    """

    name: ClassVar[str] = "scaleot"
    places: ClassVar[bool] = True
    n_adapters: int = 0
    adapters: tuple[int, ...] = ()
    alpha: float = 0.0
    beta: float = 0.0
    rank_by: str = "scores"
    attention: bool = True
    ffn: bool = False
    truncation: str = "outputs"
    settle_steps: int = 0
    settle_lr: float = 2e-3
    bf16: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_fraction("alpha", self.alpha)
        check_fraction("beta", self.beta)
        one = (self.n_adapters > 0) != bool(self.adapters)
        check(one, "n_adapters, adapters", (self.n_adapters, self.adapters), "one of the two")
        one_of("rank_by", self.rank_by, RANKS)
        one_of("truncation", self.truncation, TRUNCATIONS)
        check(self.settle_steps >= 0, "settle_steps", self.settle_steps, ">= 0")

    def plan(self, model: Model, material: Material) -> EmulatorPlan:
        """Return which block plays which part.

        Raises:
            ConfigError: if N_a + replaced > L, or scores are needed and not given.
        """
        layers = probe(model).num_layers
        scores = [0.0] * layers
        if material.importance is not None:
            scores = list(getattr(material.importance, self.rank_by))
            if not scores:
                raise ConfigError("rank_by='costs': the importance run must be finished with them")
        elif self.alpha > 0 or not self.adapters:
            raise ConfigError("scaleot: needs an importance run unless alpha=0 and adapters given")
        check(len(scores) == layers, "scores", len(scores), f"one for each of {layers} blocks")
        count = self.n_adapters
        if self.adapters:
            chosen = adapters_in(layers, self.adapters)
            for position in chosen:
                scores[position] = max(scores) + 1.0
            count = len(chosen)
        return EmulatorPlan.from_scores(scores, count, self.alpha, self.beta)

    @property
    def streams(self) -> bool:
        return self.settle_steps == 0 and not (self.beta > 0 and self.truncation == "outputs")

    @classmethod
    def run_settings(cls, offsite: OffsiteConfig) -> dict[str, Any]:
        return {
            "alpha": offsite.alpha,
            "beta": offsite.beta,
            "rank_by": offsite.rank_by,
            "truncation": offsite.truncation,
            "settle_steps": offsite.settle_steps,
            "bf16": offsite.bf16,
        }

    @classmethod
    def needs_importance(cls, offsite: OffsiteConfig) -> bool:
        """Return whether blocks are ranked, or replaced by harmonizers."""
        return offsite.alpha > 0 or not offsite.chosen

    @classmethod
    def variants(
        cls, layers: int, adapters: int, alphas: Sequence[float], betas: Sequence[float]
    ) -> dict[str, Self]:
        """Return one variant for each pair of alpha and beta."""
        return {
            f"{cls.name} A={adapters} alpha={alpha:g} beta={beta:g}": cls(
                n_adapters=adapters, alpha=alpha, beta=beta
            )
            for alpha in alphas
            for beta in betas
            if alpha < 1.0 or beta == 0  # else nothing remains to be compressed
        }

    def forecast(self, sizes: Sizes) -> Forecast:
        """Return the emulator's size without building it (harmonizers of the default width)."""
        count = self.n_adapters or len(adapters_in(sizes.layers, self.adapters))
        plan = EmulatorPlan.from_scores([0.0] * sizes.layers, count, self.alpha, self.beta)
        replaced, rest = len(plan.having(HARMONIZER)), sizes.layers - count
        kept = rest - replaced
        width = default_width(sizes.hidden)
        harmonizers = replaced * (2 * sizes.hidden * width + 3 * sizes.hidden + width)
        saved = lossy = 0
        if self.beta > 0 and kept:
            layout = sizes.known_layout(self.name)
            saved = compressed_numel(layout, self.beta, self.attention, self.ffn)
            lossy = self.attention * sizes.attention + self.ffn * sizes.ffn
        frozen = kept * (sizes.block - saved) + harmonizers
        whole = plain_forecast(sizes, count, kept, depth=sizes.layers)
        return replace(
            whole,
            frozen=frozen,
            frozen_bytes=frozen * sizes.width,
            run=frozen,
            verbatim=whole.verbatim - kept * lossy,
        )

    def build(self, model: Model, material: Material) -> Emulator:
        """Return the emulator.

        Raises:
            ConfigError: if N_a + replaced > L, or scores or tokens are needed and not given.
            ModelError: if the importance run is of another base.
            UnsupportedModelError: if beta > 0 and the block's projections cannot be told.
        """
        plan = self.plan(model, material)
        digest = material.base_digest or weights_digest(model)
        details: dict[str, Any] = {"ranks": {}}
        importance = material.importance
        if importance is not None:
            _check_base(importance, digest)
            details["scores"] = list(importance.scores)
            if self.settle_steps:
                importance = self.settled(model, material)

        compressed, which = plan.having(COMPRESS), {"attention": self.attention, "ffn": self.ffn}
        roots = truncation_roots(self.truncation, self.name, model, material, compressed, **which)

        def edit(position: int, block: nn.Module) -> None:
            details["ranks"][str(position)] = compress_block(
                block,
                dense_layout_of(model.config),
                self.beta,
                seed=self.seed,
                roots=roots.get(position),
                **which,
            )

        return self.made(
            model,
            plan,
            replace(material, base_digest=digest),
            harmonizers=dict(enumerate(importance.harmonizers)) if importance else None,
            edit=edit if compressed else None,
            details=details,
        )

    def settled(self, model: Model, material: Material) -> Importance:
        """Return the importance run with this plan's harmonizers trained together in their places.

        The blocks between them are whole meanwhile: harmonizers that made up for SRC would undo it,
        and these serve emulators of every beta (then with ``settle_steps=0``).

        Raises:
            ConfigError: see :meth:`build`.
            ModelError: if the importance run is of another base.
        """
        if material.importance is None:
            raise ConfigError("scaleot: needs an importance run to settle harmonizers; found none")
        plan = self.plan(model, material)
        digest = material.base_digest or weights_digest(model)
        _check_base(material.importance, digest)
        harmonizers = list(material.importance.harmonizers)
        if plan.having(HARMONIZER) and self.settle_steps:
            roles = tuple(KEEP if role == COMPRESS else role for role in plan.roles)
            whole = build_emulator(
                model,
                EmulatorPlan(roles),
                harmonizers=dict(enumerate(harmonizers)),
                base_digest=digest,
            )
            settings = Distil(
                steps=self.settle_steps,
                batch_size=material.batch_size,
                lr=self.settle_lr,
                warmup=min(10, self.settle_steps // 10),
                lm_weight=0.0,
                logit_weight=1.0,
                hidden_at="inputs",
                roles=(HARMONIZER,),
                bf16=self.bf16,
                seed=self.seed,
            )
            distil(whole, model, material.needed_tokens(f"{self.name} settle_steps"), settings)
            trained = dict(zip(plan.positions, probe(whole.model).blocks, strict=True))
            for position in plan.having(HARMONIZER):
                block = trained[position]
                assert isinstance(block, Harmonizer)
                harmonizers[position] = block
        return replace(material.importance, harmonizers=harmonizers)


def _check_base(importance: Importance, digest: str) -> None:
    if importance.base_digest != digest:
        raise ModelError(
            f"importance: base_digest={importance.base_digest!r}: must be this model's {digest!r}"
        )
