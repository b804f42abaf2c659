"""Compressed stand-ins for linear layers: factors, narrower layers, 8- and 4-bit weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsplit.errors import ModelError


class LowRankLinear(nn.Module):
    """``y = x W^T + b`` with rows of W in groups, each of low rank: W[group] = up @ down.

    One group for a plain projection; three for a fused query/key/value matrix.

    Attributes:
        in_features: n.
        out_features: m.
        sizes: rows in each group, summing to m.
        ranks: rank of each group.
    """

    order: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        sizes: Sequence[int],
        ranks: Sequence[int],
        *,
        bias: bool,
        permuted: bool,
        like: Tensor,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, sum(sizes)
        self.sizes, self.ranks = tuple(sizes), tuple(ranks)
        self.down = nn.Parameter(like.new_empty(sum(ranks), in_features), False)
        for i, (size, rank) in enumerate(zip(sizes, ranks, strict=True)):
            self.register_parameter(f"up{i}", nn.Parameter(like.new_empty(size, rank), False))
        row = nn.Parameter(like.new_empty(self.out_features), False) if bias else None
        self.register_parameter("bias", row)
        order = like.new_empty(self.out_features, dtype=torch.long) if permuted else None
        self.register_buffer("order", order)

    def set_order(self, groups: Sequence[Sequence[int]]) -> None:
        """Say which output features each group's rows are."""
        assert self.order is not None
        flat = torch.tensor([row for group in groups for row in group])
        self.order.copy_(flat.argsort())

    def group(self, index: int) -> Tensor:
        """Return one group's ``up`` (size, rank)."""
        return self.get_parameter(f"up{index}")

    @property
    def weight(self) -> Tensor:
        """The matrix (m, n) that this layer applies, made on each access."""
        downs = torch.split(self.down, list(self.ranks))
        return self._ordered([self.group(i) @ d for i, d in enumerate(downs)], 0)

    def _ordered(self, parts: list[Tensor], dim: int) -> Tensor:
        joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
        return joined if self.order is None else joined.index_select(dim, self.order)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., n) to (..., m)."""
        inner = F.linear(x, self.down)  # (..., sum of ranks)
        parts = [
            F.linear(z, self.group(i))
            for i, z in enumerate(torch.split(inner, list(self.ranks), -1))
        ]
        y = self._ordered(parts, inner.dim() - 1)
        return y if self.bias is None else y + self.bias

    def check(self, name: str) -> None:
        """Raise unless ``order`` is a permutation.

        Raises:
            ModelError: names the buffer.
        """
        if self.order is not None:
            wanted = torch.arange(self.out_features, device=self.order.device)
            if not torch.equal(self.order.sort().values, wanted):
                raise ModelError(
                    f"{name}.order: must be a permutation of 0..{self.out_features - 1}"
                )


class QuantisedLinear(nn.Module):
    """``y = x W^T + b`` with W[i] = scale[i] * codes[i], signed integers of 8 or 4 bits.

    Attributes:
        in_features: n.
        out_features: m.
        bits: 8 (one code a byte) or 4 (two codes a byte).
    """

    codes: Tensor
    scale: Tensor
    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, bits: int, *, bias: bool, like: Tensor
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        stored = in_features if bits == 8 else (in_features + 1) // 2
        kind = torch.int8 if bits == 8 else torch.uint8
        self.register_buffer("codes", like.new_empty(out_features, stored, dtype=kind))
        self.register_buffer("scale", like.new_empty(out_features))
        row = nn.Parameter(like.new_empty(out_features), False) if bias else None
        self.register_parameter("bias", row)

    def set_weight(self, weight: Tensor) -> None:
        """Round ``weight`` (m, n) to the grid, symmetric, one scale for each output channel."""
        top = 2 ** (self.bits - 1) - 1
        scale = weight.abs().amax(1) / top
        scale = torch.where(scale > 0, scale, torch.ones_like(scale)).to(self.scale.dtype)
        codes = (weight / scale[:, None]).round().clamp(-top, top).to(torch.int8)
        self.scale.copy_(scale)
        self.codes.copy_(codes if self.bits == 8 else _pack(codes))

    @property
    def weight(self) -> Tensor:
        """The matrix (m, n) that this layer applies, made on each access."""
        codes = self.codes if self.bits == 8 else _unpack(self.codes, self.in_features)
        return codes.to(self.scale.dtype) * self.scale[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., n) to (..., m)."""
        return F.linear(x, self.weight, self.bias)


def _pack(codes: Tensor) -> Tensor:
    """Return (m, n) int8 in -7..7 as (m, ceil(n/2)) uint8, the earlier column in the low half."""
    nibbles = (codes.to(torch.int16) + 8).to(torch.uint8)
    nibbles = F.pad(nibbles, (0, nibbles.shape[1] % 2), value=8)
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def _unpack(packed: Tensor, columns: int) -> Tensor:
    both = torch.stack([packed & 15, packed >> 4], -1).flatten(1)  # (m, 2 * stored)
    return both[:, :columns].to(torch.int8) - 8


def is_linear(module: nn.Module) -> bool:
    """Return whether ``module`` is a linear layer, plain or GPT-2-style (weight transposed)."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Return whether ``module`` keeps its weight as (in, out), as GPT-2's Conv1D does."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear) or not isinstance(weight, Tensor) or weight.dim() != 2:
        return False
    return bool(getattr(module, "nf", None) == weight.shape[1])


def matrix_of(module: nn.Module) -> Tensor:
    """Return the weight of a linear layer as (out, in), a view."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().T if is_transposed(module) else weight.detach()


def bias_of(module: nn.Module) -> Tensor | None:
    """Return the bias (out,) of a linear layer, if it has one."""
    bias = getattr(module, "bias", None)
    return bias.detach() if isinstance(bias, Tensor) else None


def set_matrix(module: nn.Module, matrix: Tensor, bias: Tensor | None) -> None:
    """Give a linear layer another matrix (out, in), of any size, and bias."""
    stored = matrix.T if is_transposed(module) else matrix
    resize(module, tuple(stored.shape), bias is not None, matrix)
    weight = module.weight
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        weight.copy_(stored)
        if bias is not None:
            module.get_parameter("bias").copy_(bias)


def resize(module: nn.Module, shape: tuple[int, ...], bias: bool, like: Tensor) -> None:
    """Make room for a weight of the stored ``shape``, uninitialised, and its bias."""
    turned = is_transposed(module)
    rows, columns = shape if not turned else shape[::-1]
    module.register_parameter("weight", nn.Parameter(like.new_empty(*shape), False))
    if "bias" in module._parameters:
        row = nn.Parameter(like.new_empty(rows), False) if bias else None
        module.register_parameter("bias", row)
    for name, value in (
        ("out_features", rows),
        ("in_features", columns),
        ("nf", rows),
        ("nx", columns),
    ):
        if isinstance(getattr(module, name, None), int):
            setattr(module, name, value)
