"""Low-rank updates of every projection in a block (Hu et al., arXiv 2106.09685), by PEFT."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedsplit.errors import ConfigError
from fedsplit.models.adapters.method import AdapterMethod, MethodSettings, any_of


def _lora(model: Any, block: nn.Module, settings: MethodSettings) -> set[int]:
    from peft import LoraConfig, inject_adapter_in_model

    found = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    if not found:
        raise ConfigError(f"method='lora': {type(block).__name__} has no nn.Linear or Conv1D")
    before = {id(p) for p in block.parameters()}
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]
        target_modules=any_of(found),
        fan_in_fan_out=all(isinstance(m, Conv1D) for m in found.values()),
        bias="none",
    )
    inject_adapter_in_model(config, block)
    return {id(p) for p in block.parameters()} - before


def lora_layers(block: nn.Module) -> dict[str, Any]:
    """Return a block's layers that carry LoRA's updates, by name."""
    found = {n: m for n, m in block.named_modules() if "default" in getattr(m, "lora_A", {})}
    return {name: layer for name, layer in found.items() if hasattr(layer, "base_layer")}


def _peft_form(
    state: Mapping[str, Tensor], settings: MethodSettings, model: Any, blocks: Collection[str]
) -> tuple[Any, dict[str, Tensor]]:
    from peft import LoraConfig

    targets = sorted({name.partition(".lora_")[0] for name in state})
    turned = [isinstance(model.get_submodule(t).base_layer, Conv1D) for t in targets]
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]
        target_modules=any_of(targets),
        fan_in_fan_out=all(turned),
        bias="none",
    )
    return config, {name.replace(".default.", "."): tensor for name, tensor in state.items()}


LORA = AdapterMethod(_lora, peft_form=_peft_form)
