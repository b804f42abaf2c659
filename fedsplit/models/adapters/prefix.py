"""A trainable key/value prefix in a block's attention, which starts as nothing.

Prefix tuning (Li and Liang 2021) puts keys and values before the text's; even zero vectors would
take part of the softmax, so a prefix never starts as the identity, and peft's goes into every
block.  This is LLaMA-Adapter's form (Zhang et al., arXiv 2303.16199, eq. 6-8): the prefix has a
softmax of its own, and a gate per head, zero at the start, scales what it adds.  Queries are taken
before any rotary turn, since a prefix has no positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedsplit.errors import UnsupportedModelError
from fedsplit.models.adapters.method import AdapterMethod, MethodSettings
from fedsplit.models.anatomy import probe
from fedsplit.models.layout.projections import BlockLayout, layout_of

NAME = "fedsplit_prefix"


class GatedPrefix(nn.Module):
    """What P trained positions add to the H heads of one attention.

    Args:
        layout: of the block: heads H, key/value heads G, head size D.
        length: P.
        width: d, of the hidden states; scales the start.
    """

    def __init__(self, layout: BlockLayout, length: int, width: int) -> None:
        super().__init__()
        shape = (layout.kv_heads, length, layout.head_dim)  # (G, P, D)
        self.keys = nn.Parameter(torch.randn(shape) * width**-0.5)
        self.values = nn.Parameter(torch.randn(shape) * width**-0.5)
        self.gate = nn.Parameter(torch.zeros(layout.heads))  # (H,)
        self._layout = layout
        self._queries: Tensor | None = None

    def forward(self, queries: Tensor) -> Tensor:
        """Map queries (..., H D) to what is added to the heads' outputs, (..., H D)."""
        layout = self._layout
        turn = list(layout.kv_of_head)
        q = queries.reshape(*queries.shape[:-1], layout.heads, layout.head_dim)  # (..., H, D)
        scores = torch.einsum("...hd,hpd->...hp", q, self.keys[turn].to(q.dtype))
        weights = (scores.float() * layout.head_dim**-0.5).softmax(-1).to(q.dtype)
        found = torch.einsum("...hp,hpd->...hd", weights, self.values[turn].to(q.dtype))
        return (torch.tanh(self.gate).to(q.dtype)[:, None] * found).flatten(-2)

    def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """Keep the query projection's output (a forward hook)."""
        rows = self._layout.q.rows
        self._queries = output if rows is None else output[..., list(rows)]

    def add(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Add to the output projection's input, the heads side by side (a forward pre-hook)."""
        queries, self._queries = self._queries, None
        if queries is None:
            raise UnsupportedModelError("output projection ran before the query projection")
        heads: Tensor = args[0]
        return (heads + self(queries).view_as(heads), *args[1:])


def add_prefix(block: nn.Module, layout: BlockLayout, length: int, width: int) -> None:
    """Give a block's attention a prefix under the name :data:`NAME`.

    Raises:
        UnsupportedModelError: if its query or output projection is no module with a ``weight``.
    """
    places = []
    for site in (layout.q, layout.o):
        place, _, leaf = site.weight.rpartition(".")
        if leaf != "weight" or not place:
            raise UnsupportedModelError(
                f"{site.weight}: a prefix needs projections that are modules"
            )
        places.append(block.get_submodule(place))
    like = next(p for p in block.parameters() if p.is_floating_point())
    prefix = GatedPrefix(layout, length, width).to(like.device, like.dtype)
    block.add_module(NAME, prefix)
    places[0].register_forward_hook(prefix.keep)
    places[1].register_forward_pre_hook(prefix.add)


def _choose(model: Any, block: nn.Module, settings: MethodSettings) -> set[int]:
    before = {id(p) for p in block.parameters()}
    add_prefix(block, layout_of(model.config), settings.prefix, probe(model).hidden_size)
    return {id(p) for p in block.parameters()} - before


def _count(layout: BlockLayout, settings: MethodSettings) -> int:
    return 2 * layout.kv_heads * settings.prefix * layout.head_dim + layout.heads


PREFIX = AdapterMethod(_choose, foldable=False, mark=NAME, count=_count)
