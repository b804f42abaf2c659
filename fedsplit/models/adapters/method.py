"""What every way to train chosen blocks has in common."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedsplit.config.groups import LORA_FORMS
from fedsplit.errors import ModelError, check, one_of
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
        lora_dropout: on the input of LoRA's updates, in training mode.
        lora_targets: last parts of the names of the projections that get LoRA's updates, separated
            by commas; empty: all.
        lora_form: ``lora``, ``rslora`` (scaled by alpha over the root of the rank) or ``dora``.
    """

    method: str = "full"
    rank: int = 8
    lora_alpha: float = 16.0
    width: int = 32
    prefix: int = 8
    seed: int = 0
    lora_dropout: float = 0.0
    lora_targets: str = ""
    lora_form: str = "lora"

    def __post_init__(self) -> None:
        for name in ("rank", "width", "prefix"):
            check(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        check(self.lora_alpha > 0, "lora_alpha", self.lora_alpha, "> 0")
        check(0 <= self.lora_dropout < 1, "lora_dropout", self.lora_dropout, "in [0, 1)")
        good = isinstance(self.lora_targets, str)  # of files, too
        check(good, "lora_targets", self.lora_targets, "names, separated by commas")
        one_of("lora_form", self.lora_form, LORA_FORMS)


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
        check: (all blocks, settings) -> None; refuses settings that do not fit the blocks together.
    """

    choose: Callable[[Any, nn.Module, MethodSettings], set[int]]
    own: bool = False
    foldable: bool = True
    mark: str = ""
    count: Callable[[BlockLayout, MethodSettings], int] | None = None
    peft_form: PeftForm | None = None
    check: Callable[[Iterable[nn.Module], MethodSettings], None] | None = None


def load_named(
    named: Mapping[str, nn.Parameter],
    state: Mapping[str, Tensor],
    what: str = "adapter state",
    names: str = "names of what is trained in A",
) -> None:
    """Set parameters from tensors of the same names; all of them or none.

    Raises:
        ModelError: if a name is missing or unknown, or a tensor has another shape, is not floating
            point where the parameter is, or not finite in the parameter's dtype.
    """
    missing, unknown = sorted(named.keys() - state.keys()), sorted(state.keys() - named.keys())
    if missing or unknown:
        raise ModelError(
            f"{what}: missing {missing[:3]} ({len(missing)}), unknown {unknown[:3]} "
            f"({len(unknown)}): must be the {len(named)} {names}"
        )
    for name, parameter in named.items():
        tensor = state[name]
        if tensor.shape != parameter.shape:
            raise ModelError(
                f"{name}: shape {tuple(tensor.shape)}: must be {tuple(parameter.shape)}"
            )
        if tensor.is_floating_point() != parameter.is_floating_point():
            kind = "floating point" if parameter.is_floating_point() else str(parameter.dtype)
            raise ModelError(f"{name}: dtype {tensor.dtype}: must be {kind}")
        # After the cast: a finite float32 can be infinite in float16.
        if not bool(tensor.to(parameter.dtype).isfinite().all()):
            raise ModelError(f"{name}: must be finite in {parameter.dtype}")
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(state[name])
