"""Withholding: secret noise on the head, for a loss margin that tuning A cannot take back.

What lies in front of A's last block is repaired by tuning A; what lies behind it is not.  Behind it
is the head.  Ours: a secret random matrix N is added to it (and so to a tied embedding), of low
rank, in the r directions in which the final hidden states h vary most:

    logits = (W + N) h,    N = s B V^T,    B (V, r) standard normal, V (d, r) the directions

- N h differs from token to token and cannot be undone in front of the head: its columns lie outside
  the range of W but for a share d / V of them.
- A receives (W + N)^T g instead of W^T g.  N^T g lies in r of d directions, so its gradient stays
  aligned with the full model's; over those directions h has most of its energy, so that little
  noise in the gradient buys much in the loss.
- s is chosen so that the untuned emulator loses ``margin`` nats by it on public text.

What it does not hold against: the rows of N are learned by whoever trains the head against the full
model's answers, and full logits of some hundred positions give the range of W by linear algebra.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fedsplit.config import OffsiteConfig
from fedsplit.emulators.build import Emulator
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
    whole_forecast,
)
from fedsplit.emulators.compressors.truncation import truncation_roots
from fedsplit.emulators.lm import logits_of, mean_loss
from fedsplit.emulators.planning.plan import COMPRESS, KEEP, EmulatorPlan, check_fraction
from fedsplit.errors import ConfigError, UnsupportedModelError, check, one_of
from fedsplit.models.anatomy import probe
from fedsplit.models.layout.projections import dense_layout_of
from fedsplit.models.modes import evaluating

ROUNDS = 24  # at most, of measuring the loss and correcting the scale
CLOSE = 0.05  # of the margin


@dataclass(frozen=True)
class Withholding(Compressor):
    """Low-rank secret noise on the head, and ranks of attention truncated outside A.

    Attributes:
        adapters: A's positions.
        margin: nats that the untuned emulator loses by the noise on the calibration text; 0: none.
        rank: r, directions of the hidden state that the noise is in.
        beta: rank reduction of the attention outside A, as in ScaleOT; 0: blocks stay as they are.
        truncation: of what, as in ScaleOT.
        calibration: token blocks that the margin is measured on at most, the first ones.
        secret: seed of the noise; None: drawn from the system.  Never written into the emulator:
            who knows it takes the noise off.
    """

    name: ClassVar[str] = "withholding"
    adapters: tuple[int, ...]
    margin: float = 0.0
    rank: int = 16
    beta: float = 0.0
    truncation: str = "outputs"
    calibration: int = 32
    secret: int | None = None

    def __post_init__(self) -> None:
        good = math.isfinite(self.margin) and self.margin >= 0
        check(good, "margin", self.margin, ">= 0 (nats)")
        check(self.rank >= 1, "rank", self.rank, ">= 1")
        check_fraction("beta", self.beta)
        one_of("truncation", self.truncation, TRUNCATIONS)
        check(self.calibration >= 1, "calibration", self.calibration, ">= 1 (blocks)")

    @classmethod
    def run_settings(cls, offsite: OffsiteConfig) -> dict[str, Any]:
        return {
            "margin": offsite.margin,
            "beta": offsite.beta,
            "truncation": offsite.truncation,
        }

    def forecast(self, sizes: Sizes) -> Forecast:
        """Return the emulator's size without building it."""
        whole, rest = whole_forecast(sizes, self.adapters)
        saved = lossy = 0
        if self.beta > 0 and rest:
            saved = compressed_numel(sizes.known_layout(self.name), self.beta, True, False)
            lossy = sizes.attention
        return replace(
            whole,
            frozen=whole.frozen - rest * saved,
            frozen_bytes=whole.frozen_bytes - rest * saved * sizes.width,
            run=whole.run - rest * saved,
            verbatim=whole.verbatim - rest * lossy,
            head_verbatim=self.margin == 0,
        )

    def build(self, model: Model, material: Material) -> Emulator:
        """Return the emulator; a margin, and ranks by outputs, need calibration tokens.

        Raises:
            ConfigError: if there are no tokens, or no noise reaches the margin.
            UnsupportedModelError: if the model has no head, or its projections cannot be told.
        """
        layers = probe(model).num_layers
        chosen = adapters_in(layers, self.adapters)
        plan = EmulatorPlan.with_adapters(layers, chosen, COMPRESS if self.beta > 0 else KEEP)

        compressed = plan.having(COMPRESS)
        roots = truncation_roots(self.truncation, self.name, model, material, compressed)

        def edit(position: int, block: nn.Module) -> None:
            layout = dense_layout_of(model.config)
            compress_block(block, layout, self.beta, roots=roots.get(position))

        told = {k: v for k, v in asdict(self).items() if k != "secret"}
        details: dict[str, Any] = {"settings": told, "changed": []}
        emulator = self.made(model, plan, material, edit=edit, details=details)
        if self.margin > 0:
            tokens = material.needed_tokens(self.name)[: self.calibration]
            name = _head_name(emulator.model)
            reached = self._withhold(emulator, name, tokens, material.batch_size)
            emulator.details |= {"reached": reached, "changed": [name]}
        return emulator

    @torch.no_grad()
    def _withhold(self, emulator: Emulator, name: str, tokens: Tensor, batch: int) -> float:
        """Add noise to the head ``name``, in place; return the nats that are lost by it."""
        base = mean_loss(emulator.model, tokens, batch)
        weight = emulator.model.get_parameter(name)
        second = _second_moment(emulator.model, tokens, batch)
        energy, directions = torch.linalg.eigh(second)  # rising
        rank = min(self.rank, len(energy))
        # Not PyTorch's generator: it keeps 32 bits of a seed, which can all be tried.
        seed = secrets.randbits(256) if self.secret is None else self.secret
        noise = torch.from_numpy(np.random.default_rng(seed).standard_normal((len(weight), rank)))
        plain = weight.detach().clone()
        change = (noise.to(directions) @ directions[:, -rank:].T).float()  # (V, d)
        # Noise of variance v on every logit costs about v / 2.
        scale = math.sqrt(2 * self.margin / max(float(energy[-rank:].sum()), 1e-12))
        weight.copy_(plain.float() + scale * change.to(weight.device))
        if mean_loss(emulator.model, tokens, batch) < base:
            change = -change  # the loss is convex along a line of heads: it rises the other way
        low, high, lost = 0.0, math.inf, 0.0
        for _ in range(ROUNDS):
            weight.copy_(plain.float() + scale * change.to(weight.device))
            lost = mean_loss(emulator.model, tokens, batch) - base
            if abs(lost - self.margin) <= CLOSE * self.margin:
                return lost
            low, high = (scale, high) if lost < self.margin else (low, scale)
            scale *= math.sqrt(self.margin / lost) if lost > 0 else 2.0
            if not low < scale < high:
                scale = 2 * low if math.isinf(high) else (low + high) / 2
        raise ConfigError(
            f"margin={self.margin}: {ROUNDS} corrections of the noise reach {lost:.3f} nats; must "
            f"be within {CLOSE:.0%}: another margin, rank or calibration text"
        )


def _head_name(model: Model) -> str:
    head = probe(model).output_embeddings
    weight = getattr(head, "weight", None)
    if isinstance(weight, Tensor) and weight.dim() == 2:
        for name, parameter in model.named_parameters():
            if parameter is weight:
                return str(name)
    raise UnsupportedModelError(f"{type(model).__name__}: must have a head with a matrix")


def _second_moment(model: Model, tokens: Tensor, batch: int) -> Tensor:
    """Return the mean of h h^T over tokens, (d, d) float64, h what enters the head."""
    head = probe(model).output_embeddings
    assert isinstance(head, nn.Module)
    total, count = torch.zeros(()).double(), 0

    def add(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal total, count
        h = args[0].detach().double().flatten(0, -2)  # (tokens, d)
        total, count = total + (h.T @ h).cpu(), count + len(h)

    device = next(model.parameters()).device
    handle = head.register_forward_pre_hook(add)
    try:
        with evaluating(model):
            for ids in torch.split(tokens, batch):
                logits_of(model, ids.to(device))
    finally:
        handle.remove()
    return total / count
