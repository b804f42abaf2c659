"""Low-rank updates of projections in a block, by PEFT.

LoRA (Hu et al., arXiv 2106.09685), and two forms of it: rsLoRA (arXiv 2312.03732) and DoRA (arXiv
2402.09353).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedsplit.errors import ConfigError
from fedsplit.models.adapters.method import AdapterMethod, MethodSettings, any_of
from fedsplit.models.layout.low_rank import updated

MAGNITUDE = "lora_magnitude_vector"


def chosen_projections(names: Iterable[str], targets: str) -> list[str]:
    """Return those of ``names`` that end in one of ``targets``, separated by commas; empty: all."""
    ends = tuple(f".{part}" for part in _parts(targets))
    return [name for name in names if not ends or f".{name}".endswith(ends)]


def check_targets(names: Collection[str], targets: str, setting: str) -> None:
    """Refuse targets of which one is the end of no projection's name.

    Args:
        names: of all projections.
        targets: last parts of names, separated by commas.
        setting: that holds them.

    Raises:
        ConfigError: names the setting, the target and the known last parts.
    """
    for one in _parts(targets):
        if not chosen_projections(names, one):
            leaves = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
            raise ConfigError(f"{setting}={one!r}: must be among {leaves}")


def _parts(targets: str) -> list[str]:
    return [part.strip() for part in targets.split(",") if part.strip()]


def saved_name(name: str) -> str:
    """Return PEFT's own name on disk: without the adapter's, and DoRA's magnitudes bare."""
    return name.replace(".default", "").replace(f".{MAGNITUDE}.weight", f".{MAGNITUDE}")


def _projections(block: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear | Conv1D)}


def _check(blocks: Iterable[nn.Module], settings: MethodSettings) -> None:
    names: set[str] = set()
    for block in blocks:
        found = _projections(block)
        if not found:
            raise ConfigError(f"method='lora': {type(block).__name__} has no nn.Linear or Conv1D")
        names |= found.keys()
    check_targets(names, settings.lora_targets, "offsite.lora-targets")


def _config(targets: Iterable[str], turned: bool, settings: MethodSettings) -> Any:
    """Return PEFT's configuration of updates of these projections."""
    from peft import LoraConfig

    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=settings.lora_dropout,
        target_modules=any_of(targets),
        fan_in_fan_out=turned,
        bias="none",
        use_rslora=settings.lora_form == "rslora",
        use_dora=settings.lora_form == "dora",
    )


def _lora(model: Any, block: nn.Module, settings: MethodSettings) -> set[int]:
    from peft import inject_adapter_in_model

    found = _projections(block)
    targets = chosen_projections(found, settings.lora_targets)
    if not targets:  # blocks of several kinds: the targets are in others
        return set()
    before = {id(p) for p in block.parameters()}
    turned = all(isinstance(found[name], Conv1D) for name in targets)
    inject_adapter_in_model(_config(targets, turned, settings), block)
    block.train(block.training)  # PEFT's modules come in training mode, where dropout acts
    return {id(p) for p in block.parameters()} - before


def lora_layers(block: nn.Module) -> dict[str, Any]:
    """Return a block's layers that carry LoRA's updates, by name."""
    found = {n: m for n, m in block.named_modules() if "default" in getattr(m, "lora_A", {})}
    return {name: layer for name, layer in found.items() if hasattr(layer, "base_layer")}


def merged_weight(layer: Any, state: Mapping[str, Tensor], name: str) -> Tensor:
    """Return what trained tensors make of a layer's own matrix, on the CPU, as it is kept there.

    Args:
        layer: of :func:`lora_layers`.
        state: trained tensors by name.
        name: of the layer there.
    """
    weight = layer.base_layer.weight.detach().cpu()
    down = state[f"{name}.lora_A.default.weight"].cpu().float()  # (r, in)
    up = state[f"{name}.lora_B.default.weight"].cpu().float()  # (out, r)
    change = layer.scaling["default"] * (up @ down)
    turned = isinstance(layer.base_layer, Conv1D)
    magnitude = state.get(f"{name}.{MAGNITUDE}.default.weight")  # (out,)
    return updated(
        weight,
        change.T if turned else change,
        None if magnitude is None else magnitude.cpu(),
        turned=turned,
    )


def _peft_form(
    state: Mapping[str, Tensor], settings: MethodSettings, model: Any, blocks: Collection[str]
) -> tuple[Any, dict[str, Tensor]]:
    targets = sorted({name.partition(".lora_")[0] for name in state})
    turned = all(isinstance(model.get_submodule(t).base_layer, Conv1D) for t in targets)
    tensors = {saved_name(name): tensor for name, tensor in state.items()}
    return _config(targets, turned, settings), tensors


LORA = AdapterMethod(_lora, peft_form=_peft_form, check=_check)
