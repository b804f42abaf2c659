"""What every way to train chosen blocks has in common."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fedsplit.errors import check
from fedsplit.models.layout.projections import BlockLayout


@dataclass(frozen=True)
class MethodSettings:
    """How chosen blocks are trained; a method reads only its own fields.

    Attributes:
        method: a row of :data:`fedsplit.models.adapters.methods.METHODS`.
        rank: of LoRA's updates.
        lora_alpha: LoRA's updates are scaled by ``lora_alpha / rank``.
        width: of the bottlenecks.
        prefix: trained positions of each attention.
        seed: of what does not start at zero; whoever starts a run sends its start, so that two
            parties need not have the same one.
    """

    method: str = "full"
    rank: int = 8
    lora_alpha: float = 16.0
    width: int = 32
    prefix: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "width", "prefix"):
            check(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        check(self.lora_alpha > 0, "lora_alpha", self.lora_alpha, "> 0")


PeftForm = Callable[
    [Mapping[str, Tensor], MethodSettings, Any, Collection[str]], tuple[Any, dict[str, Tensor]]
]


def any_of(names: Iterable[str]) -> str:
    """Return the regular expression that matches these full names: no other module can slip in."""
    return "|".join(f"(?:{re.escape(name)})" for name in names)


@dataclass(frozen=True)
class AdapterMethod:
    """One way to train chosen blocks.

    Attributes:
        choose: (model, block, settings) -> ids of the block's parameters to train; adds modules.
        own: whether what it trains are the base's own tensors.
        foldable: whether its updates can go into the base's weights.
        mark: the submodule that says that a block carries it already; empty: it adds none.
        count: (layout, settings) -> trained weights of a block, for methods that cannot be attached
            to a block without memory.
        peft_form: (trained tensors by name, settings, model, blocks' names with the dot) -> PEFT's
            configuration, and its tensors by their names below the model; None: PEFT has no format
            for it.
    """

    choose: Callable[[Any, nn.Module, MethodSettings], set[int]]
    own: bool = False
    foldable: bool = True
    mark: str = ""
    count: Callable[[BlockLayout, MethodSettings], int] | None = None
    peft_form: PeftForm | None = None
