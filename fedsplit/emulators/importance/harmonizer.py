"""A small network in the place of a block: x + W_up GELU(W_down LN(x)) (ScaleOT, 2412.09812)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedsplit.emulators.compression.structure import Model, block_outputs
from fedsplit.errors import check
from fedsplit.models.adapters.bottleneck import Bottleneck
from fedsplit.models.anatomy import probe
from fedsplit.models.splitting.structure import Pass, hidden_argument
from fedsplit.seeding import derive_seed


class Harmonizer(Pass):
    """Runs where a block ran: takes the block's arguments and returns what the block would return.

    ``y = x + W_up gelu(W_down LN(x))`` on hidden states (B, T, d).  W_up = 0 at the start, so an
    untrained harmonizer is the identity, that is, its block is dropped.  The published layer's
    inner form is not known to us; this one, and its width of d/16..d/8, is ours.

    Attributes:
        width: of the bottleneck.
        tuple_length: of what it returns; 0 for a bare tensor.
    """

    def __init__(self, block: nn.Module, tuple_length: int, size: int, width: int) -> None:
        super().__init__(block, tuple_length)
        self.width = width
        self.tuple_length = tuple_length
        self.bottleneck = Bottleneck(size, width)

    def transform(self, hidden: Tensor) -> Tensor:
        """Map hidden states (B, T, d) to (B, T, d)."""
        out: Tensor = self.bottleneck(hidden)
        return out

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Transform the hidden states; everything else a block receives is ignored."""
        hidden = self.transform(hidden_argument(args, kwargs))
        return (hidden, *[None] * (self.tuple_length - 1)) if self.tuple_length else hidden


def default_width(size: int) -> int:
    """Return the default bottleneck for width ``size``: d/8, at least 1."""
    return max(1, size // 8)


def make_harmonizers(model: Model, width: int = 0, seed: int = 0) -> list[Harmonizer]:
    """Return one untrained harmonizer for each block of ``model``, in the model's dtype.

    What a block returns (tensor or tuple) is seen in one tiny forward pass, not known by family.

    Args:
        model: any model that the anatomy knows; not changed.
        width: of the bottlenecks; 0: :func:`default_width`.
        seed: of the down projections.

    Raises:
        ConfigError: if width is not in 0..d.
        UnsupportedModelError: if the blocks cannot be told or do not run on a tiny batch.
    """
    anatomy = probe(model)
    size = anatomy.hidden_size
    check(isinstance(width, int) and 0 <= width <= size, "width", width, f"in 0..{size}")
    lengths = [len(out) if isinstance(out, tuple) else 0 for out in block_outputs(model)]
    made = []
    for i, block in enumerate(anatomy.blocks):
        like = next(p for p in block.parameters() if p.is_floating_point())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "emulators.harmonizer", i))
            one = Harmonizer(block, lengths[i], size, width or default_width(size))
        made.append(one.to(like.device, like.dtype).eval())
    return made
