"""Quantised emulators: 8- or 4-bit weights, one scale for each output channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import nn

from fedsplit.emulators.build import Emulator
from fedsplit.emulators.compression.linears import QuantisedLinear, bias_of, is_linear, matrix_of
from fedsplit.emulators.compression.structure import Model
from fedsplit.emulators.compressors.base import (
    Compressor,
    Forecast,
    Material,
    Sizes,
    adapters_in,
    whole_forecast,
)
from fedsplit.emulators.planning.plan import COMPRESS, KEEP, EmulatorPlan
from fedsplit.errors import check
from fedsplit.models.anatomy import probe

BITS = (4, 8, 32)


@dataclass(frozen=True)
class Quantised(Compressor):
    """Round-to-nearest, symmetric, per output channel; the blocks' linear layers outside A.

    Expert matrices that are not linear layers (mixtures) stay as they are.  Codes are stored as
    codes, so files and memory shrink; each use makes the matrix again.

    Attributes:
        adapters: A's positions.
        bits: 8, 4, or 32 for "as it is".
    """

    name: ClassVar[str] = "quantised"
    adapters: tuple[int, ...]
    bits: int = 8

    def __post_init__(self) -> None:
        check(self.bits in BITS, "bits", self.bits, f"one of {BITS}")

    @property
    def streams(self) -> bool:
        return True

    @classmethod
    def identity(cls, adapters: Sequence[int]) -> Self:
        return cls(adapters=tuple(adapters), bits=32)

    def forecast(self, sizes: Sizes) -> Forecast:
        whole, rest = whole_forecast(sizes, self.adapters)
        if self.bits == 32:
            return whole
        # Each matrix becomes codes (an odd row of 4-bit codes is padded) and one scale a row.
        codes = sizes.matrices * self.bits // 8
        stored = (sizes.block - sizes.matrices + sizes.rows) * sizes.width + codes
        return replace(
            whole,
            frozen=rest * (sizes.block - sizes.matrices + sizes.rows + codes),
            frozen_bytes=rest * stored,
            verbatim=whole.verbatim - rest * sizes.matrices,
        )

    def build(self, model: Model, material: Material) -> Emulator:
        layers = probe(model).num_layers
        rest = COMPRESS if self.bits < 32 else KEEP
        plan = EmulatorPlan.with_adapters(layers, adapters_in(layers, self.adapters), rest)
        return self.made(
            model, plan, material, edit=lambda _, block: quantise_block(block, self.bits)
        )


@torch.no_grad()
def quantise_block(block: nn.Module, bits: int) -> None:
    """Replace every linear layer of ``block`` by a :class:`QuantisedLinear`, in place."""
    for name, module in list(block.named_modules()):
        if name and is_linear(module):
            matrix, bias = matrix_of(module), bias_of(module)
            made = QuantisedLinear(
                matrix.shape[1], matrix.shape[0], bits, bias=bias is not None, like=matrix
            )
            made.set_weight(matrix)
            if made.bias is not None and bias is not None:
                made.bias.copy_(bias)
            block.set_submodule(name, made)
