"""Bottleneck adapters after each block (Houlsby et al. 2019; one a block: Pfeiffer et al. 2021)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fedsplit.models.adapters.method import AdapterMethod, MethodSettings
from fedsplit.models.anatomy import probe

NAME = "fedsplit_adapter"


class Bottleneck(nn.Module):
    """``h + up(gelu(down(norm(h))))``, shape (B, T, d); the identity at the start (up = 0)."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.down = nn.Linear(size, width)
        self.up = nn.Linear(width, size)
        nn.init.normal_(self.down.weight, std=size**-0.5)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (B, T, d) to (B, T, d)."""
        update: Tensor = self.up(F.gelu(self.down(self.norm(hidden))))
        return hidden + update


def add_adapters(blocks: nn.ModuleList, size: int, width: int) -> set[int]:
    """Put a :class:`Bottleneck` after each block; return the ids of the new parameters."""
    added: set[int] = set()
    for block in blocks:
        like = next(p for p in block.parameters() if p.is_floating_point())
        adapter = Bottleneck(size, width).to(like.device, like.dtype)
        block.add_module(NAME, adapter)
        block.register_forward_hook(_apply)
        added |= {id(p) for p in adapter.parameters()}
    return added


def _apply(block: nn.Module, args: Any, output: Any) -> Any:
    adapter = block.get_submodule(NAME)
    if isinstance(output, tuple):
        return (adapter(output[0]), *output[1:])
    return adapter(output)


def _choose(model: Any, block: nn.Module, settings: MethodSettings) -> set[int]:
    return add_adapters(nn.ModuleList([block]), probe(model).hidden_size, settings.width)


BOTTLENECK = AdapterMethod(_choose, foldable=False, mark=NAME)
