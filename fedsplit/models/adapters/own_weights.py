"""Training the blocks' own tensors: all of them, or their vectors alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from fedsplit.errors import UnsupportedModelError
from fedsplit.models.adapters.method import AdapterMethod, MethodSettings, any_of


def _full(model: Any, block: nn.Module, settings: MethodSettings) -> set[int]:
    return {id(p) for p in block.parameters() if p.is_floating_point()}


def _bitfit(model: Any, block: nn.Module, settings: MethodSettings) -> set[int]:
    # Every vector: biases, and the norms' weights, since LLaMA's relatives have no biases at all.
    return {id(p) for p in block.parameters() if p.is_floating_point() and p.dim() == 1}


def _peft_form(
    state: Mapping[str, Tensor], settings: MethodSettings, model: Any, blocks: Collection[str]
) -> tuple[Any, dict[str, Tensor]]:
    """Return PEFT's "LN tuning": it runs a trained copy of each named module, of whatever kind."""
    from peft import LNTuningConfig

    owners = {name: name.rpartition(".")[0] for name in state}
    modules = sorted(set(owners.values()))
    inside = {m for m in modules if any(o != m and f"{o}.".startswith(f"{m}.") for o in modules)}
    if inside or any(f"{m}." in blocks for m in modules):
        raise UnsupportedModelError(
            f"{sorted(inside)[:3] or modules[:3]}: modules with weights of their own around other "
            "modules: PEFT has no format for them"
        )
    tensors = {f"{owners[n]}.ln_tuning_layers.{n.rpartition('.')[2]}": t for n, t in state.items()}
    return LNTuningConfig(target_modules=any_of(modules)), tensors


FULL = AdapterMethod(_full, own=True, peft_form=_peft_form)
BITFIT = AdapterMethod(_bitfit, own=True, peft_form=_peft_form)
