"""Frozen matrices of a top kept in fewer bits: bfloat16, int8, nf4.

A layer stores codes and makes its matrix again for each product, forward and backward, so that
neither the layer nor the graph of a step holds a matrix in full.  What is trained beside it (LoRA's
factors, biases, heads) keeps the run's own dtype.

| form | a weight takes | rounding |
| --- | --- | --- |
| ``bfloat16`` | 16 bits | to 8 bits of precision |
| ``int8`` | 8 bits, one scale for each output feature | to the nearest of 255 equal steps |
| ``nf4`` | 4 bits, one scale for each 64 weights | to the nearest of 16 quantiles of a normal (QLoRA, arXiv 2305.14314, section 3 and appendix E; scales are not quantised again) |

It is plain PyTorch and runs on every device; it saves memory and no time.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from fedsplit.errors import ConfigError
from fedsplit.models.anatomy import probe
from fedsplit.models.modes import keep_no_activations
from fedsplit.models.splitting.halves import Top
from fedsplit.registry import pick

AS_LOADED = "as-loaded"
GROUP = 64  # weights that share a scale of nf4
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class FrozenLinear(nn.Linear):
    """``y = x W^T + b`` whose W is stored as a :class:`Form` says; gradients reach x and b alone.

    An ``nn.Linear`` so that adapters find it; ``weight`` is no parameter and made on each access.

    Attributes:
        in_features: n.
        out_features: m.
        form: a row of :data:`FORMS`.
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, matrix: Tensor, bias: nn.Parameter | None, form: str) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = matrix.shape
        self.form = form
        codes, scale = FORMS[form].encode(matrix.detach().float())
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale.to(matrix.dtype))
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The matrix (m, n), in the dtype of the scales."""
        return self.matrix(self.scale.dtype)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix (m, n) in a dtype."""
        return FORMS[self.form].decode(self.codes, self.scale, self.in_features).to(dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., n) to (..., m)."""
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        product: Tensor = _Product.apply(input, self, dtype)  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias.to(dtype)


class _Product(torch.autograd.Function):
    """x W^T, whose backward makes W again: the graph holds neither W nor x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear, dtype: torch.dtype) -> Tensor:
        ctx.layer, ctx.into = layer, x.dtype
        return F.linear(x.to(dtype), layer.matrix(dtype))

    @staticmethod
    def backward(ctx: Any, *upward: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = upward
        return (gradient @ ctx.layer.matrix(gradient.dtype)).to(ctx.into), None, None


@dataclass(frozen=True)
class Form:
    """One way to store a matrix.

    Attributes:
        encode: matrix (m, n) float32 -> codes, scales.
        decode: codes, scales, n -> matrix (m, n).
    """

    encode: Callable[[Tensor], tuple[Tensor, Tensor]]
    decode: Callable[[Tensor, Tensor, int], Tensor]


def _to_bfloat16(matrix: Tensor) -> tuple[Tensor, Tensor]:
    # As integers: a change of the model's dtype must not change them.
    return matrix.to(torch.bfloat16).view(torch.int16), matrix.new_ones(1)


def _from_bfloat16(codes: Tensor, scale: Tensor, columns: int) -> Tensor:
    return codes.view(torch.bfloat16)


def _to_int8(matrix: Tensor) -> tuple[Tensor, Tensor]:
    scale = matrix.abs().amax(1, keepdim=True) / 127
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (matrix / scale).round().clamp(-127, 127).to(torch.int8), scale


def _from_int8(codes: Tensor, scale: Tensor, columns: int) -> Tensor:
    return codes.to(scale.dtype) * scale


def _to_nf4(matrix: Tensor) -> tuple[Tensor, Tensor]:
    padded = F.pad(matrix, (0, -matrix.shape[1] % GROUP))
    padded = padded.view(len(matrix), -1, GROUP)  # (m, g, 64)
    scale = padded.abs().amax(2, keepdim=True)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    levels = matrix.new_tensor(LEVELS)
    between = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize((padded / scale).contiguous(), between).to(torch.uint8).flatten(1)
    return codes[:, 0::2] | (codes[:, 1::2] << 4), scale


def _from_nf4(codes: Tensor, scale: Tensor, columns: int) -> Tensor:
    levels = torch.tensor(LEVELS, dtype=scale.dtype, device=codes.device)
    both = torch.stack([codes & 15, codes >> 4], -1).flatten(1)  # (m, groups * 64)
    matrix = levels[both.int()].view(len(codes), -1, GROUP) * scale
    return matrix.flatten(1)[:, :columns]


FORMS: dict[str, Form] = {
    "bfloat16": Form(_to_bfloat16, _from_bfloat16),
    "int8": Form(_to_int8, _from_int8),
    "nf4": Form(_to_nf4, _from_nf4),
}
"""The family's table, by the names that ``server.frozen-weights`` takes."""


@torch.no_grad()
def store_frozen(top: Top, form: str) -> int:
    """Replace the linear layers of a top's blocks, in place, before anything is added to them.

    Embeddings, heads, norms, biases and expert matrices that are no linear layers stay as they are.

    Args:
        top: of a cut model, on whatever device.
        form: a row of :data:`FORMS`.

    Returns:
        How many layers were replaced.

    Raises:
        ConfigError: an unknown form, or blocks without linear layers.
    """
    pick(FORMS, form, "server.frozen-weights")
    blocks = probe(top.model).blocks
    found = [(n, m) for n, m in blocks.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    for name, module in found:
        weight: Tensor = module.weight
        matrix = weight.T if isinstance(module, Conv1D) else weight  # Conv1D keeps (n, m)
        blocks.set_submodule(name, FrozenLinear(matrix, module.bias, form))
    if not found:
        kind = type(top.model).__name__
        raise ConfigError(f"server.frozen-weights={form!r}: {kind}'s blocks have no linear layers")
    return len(found)


def recompute(top: Top) -> None:
    """Let a top keep no activations inside its blocks while it trains, and compute them again.

    The first block keeps its own: what enters it is handed over once.  Gradients stay the same.

    Raises:
        ConfigError: the family cannot.
    """
    try:
        keep_no_activations(top.model)
    except ValueError as error:
        raise ConfigError(f"server.checkpointing=true: {error}") from error
    for module in probe(top.model).blocks[0].modules():
        if hasattr(module, "gradient_checkpointing"):
            setattr(module, "gradient_checkpointing", False)  # noqa: B010  transformers' own flag
