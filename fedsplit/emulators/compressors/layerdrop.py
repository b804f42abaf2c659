"""Uniform LayerDrop, the emulator of Offsite-Tuning (arXiv 2302.04870, section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from fedsplit.config import OffsiteConfig
from fedsplit.emulators.build import Emulator
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
from fedsplit.emulators.planning.plan import ADAPTER, DROP, KEEP, EmulatorPlan, outer_blocks
from fedsplit.errors import check
from fedsplit.models.anatomy import probe


@dataclass(frozen=True)
class LayerDrop(Compressor):
    """Keep n of the N middle blocks, at even distances; drop the others.

    Attributes:
        adapters: A's positions (Offsite-Tuning: the first and last blocks, see ``plan.ends``).
        keep: n; None: all of them (no compression).
        distil_steps: distillation of the kept blocks against the full model; 0: none.
        distil_lr: its learning rate.
        bf16: autocast while distilling.
        seed: of the distillation.
    """

    name: ClassVar[str] = "layerdrop"
    adapters: tuple[int, ...]
    keep: int | None = None
    distil_steps: int = 0
    distil_lr: float = 3e-4
    bf16: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check(self.keep is None or self.keep >= 0, "keep", self.keep, "None or >= 0 (blocks)")
        check(self.distil_steps >= 0, "distil_steps", self.distil_steps, ">= 0")

    @classmethod
    def run_settings(cls, offsite: OffsiteConfig) -> dict[str, Any]:
        return {"keep": offsite.keep, "distil_steps": offsite.settle_steps}

    @classmethod
    def variants(
        cls, layers: int, adapters: int, alphas: Sequence[float], betas: Sequence[float]
    ) -> dict[str, Self]:
        """Return the variant that keeps half of the blocks outside A."""
        chosen = outer_blocks(layers, adapters)
        left = layers - len(chosen)
        if left <= 1:
            return {}
        kept = max(1, left // 2)
        return {f"{cls.name} A={adapters} keep={kept}": cls(adapters=chosen, keep=kept)}

    @property
    def streams(self) -> bool:
        return self.distil_steps == 0

    def forecast(self, sizes: Sizes) -> Forecast:
        chosen = len(adapters_in(sizes.layers, self.adapters))
        return plain_forecast(sizes, chosen, self._count(sizes.layers - chosen))

    def _count(self, middle: int) -> int:
        keep = middle if self.keep is None else self.keep
        check(keep <= middle, "keep", keep, f"<= {middle}, the blocks outside A")
        return keep

    def build(self, model: Model, material: Material) -> Emulator:
        """Return the emulator.

        Raises:
            ConfigError: if keep exceeds the middle blocks, or distillation lacks tokens.
        """
        layers = probe(model).num_layers
        chosen = adapters_in(layers, self.adapters)
        middle = [i for i in range(layers) if i not in chosen]
        keep = self._count(len(middle))
        kept = {middle[i] for i in uniform_indices(len(middle), keep)}
        roles = tuple(
            ADAPTER if i in chosen else KEEP if i in kept else DROP for i in range(layers)
        )
        emulator = self.made(model, EmulatorPlan(roles), material)
        if self.distil_steps and keep:
            settings = Distil(
                steps=self.distil_steps,
                batch_size=material.batch_size,
                lr=self.distil_lr,
                bf16=self.bf16,
                seed=self.seed,
            )
            distil(emulator, model, material.needed_tokens(f"{self.name} distil_steps"), settings)
        return emulator


def uniform_indices(total: int, keep: int) -> list[int]:
    """Return round(i (N - 1) / (n - 1)) for i < n; the middle one for n = 1."""
    if keep == 1:
        return [(total - 1) // 2]
    return [round(i * (total - 1) / (keep - 1)) for i in range(keep)]
