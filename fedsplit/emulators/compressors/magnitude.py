"""Magnitude pruning: the smallest weights of each frozen matrix become zero."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedsplit.config import OffsiteConfig
from fedsplit.emulators.build import Emulator
from fedsplit.emulators.compression.structure import Model
from fedsplit.emulators.compressors.base import (
    Compressor,
    Forecast,
    Material,
    Sizes,
    adapters_in,
    whole_forecast,
)
from fedsplit.emulators.planning.plan import COMPRESS, KEEP, EmulatorPlan, check_fraction
from fedsplit.models.anatomy import probe


@dataclass(frozen=True)
class Magnitude(Compressor):
    """Unstructured pruning of every matrix in the blocks outside A (Han et al. 2015).

    The emulator's tensors keep their shapes: ``details["nonzero"]`` counts what is left.  The
    weights that survive are the base's own: this hides little.

    Attributes:
        adapters: A's positions.
        sparsity: share of each matrix set to zero, in [0, 1].
    """

    name: ClassVar[str] = "magnitude"
    adapters: tuple[int, ...]
    sparsity: float = 0.0

    def __post_init__(self) -> None:
        check_fraction("sparsity", self.sparsity)

    @property
    def streams(self) -> bool:
        return True

    @classmethod
    def run_settings(cls, offsite: OffsiteConfig) -> dict[str, Any]:
        return {"sparsity": offsite.beta}

    def forecast(self, sizes: Sizes) -> Forecast:
        """Return the emulator's size without building it (zeros are stored too)."""
        whole, rest = whole_forecast(sizes, self.adapters)
        zeros = int(self.sparsity * sizes.matrices) * rest
        return replace(whole, verbatim=whole.verbatim - zeros)

    def build(self, model: Model, material: Material) -> Emulator:
        layers = probe(model).num_layers
        rest = COMPRESS if self.sparsity > 0 else KEEP
        plan = EmulatorPlan.with_adapters(layers, adapters_in(layers, self.adapters), rest)
        emulator = self.made(
            model, plan, material, edit=lambda _, block: prune_block(block, self.sparsity)
        )
        nonzero = sum(int(p.count_nonzero()) for p in emulator.model.parameters())
        emulator.details["nonzero"] = nonzero
        return emulator


@torch.no_grad()
def prune_block(block: nn.Module, sparsity: float) -> None:
    """Zero the smallest entries of every matrix of ``block``, in place."""
    for parameter in block.parameters():
        if parameter.dim() >= 2 and parameter.is_floating_point():
            parameter.copy_(pruned(parameter, sparsity))


def pruned(matrix: Tensor, sparsity: float) -> Tensor:
    """Return a copy of ``matrix`` with its floor(sparsity * size) smallest entries at zero."""
    count = int(sparsity * matrix.numel() + 1e-9)
    flat = matrix.detach().flatten().clone()
    if count:
        flat[flat.abs().topk(count, largest=False).indices] = 0
    return flat.view_as(matrix)
