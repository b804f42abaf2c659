"""What is trained inside chosen blocks of a model: the blocks themselves, or a small part of them.

For offsite tuning: the chosen blocks are A.  The same modules go into the emulator's A at the owner
and into the full model's at the server, and only what is trained travels, by its name in the full
model.  Every method starts as the identity: attaching it changes no output.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedsplit.errors import ConfigError, ModelError, UnsupportedModelError, check
from fedsplit.models.adapters.bottleneck import add_adapters
from fedsplit.models.adapters.prefix import add_prefix
from fedsplit.models.anatomy import probe
from fedsplit.models.layout.projections import layout_of
from fedsplit.registry import pick
from fedsplit.seeding import derive_seed


@dataclass(frozen=True)
class MethodSettings:
    """How chosen blocks are trained; a method reads only its own fields.

    Attributes:
        method: a row of :data:`METHODS`.
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
        pick(METHODS, self.method, "method")
        for name in ("rank", "width", "prefix"):
            check(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        check(self.lora_alpha > 0, "lora_alpha", self.lora_alpha, "> 0")


class BlockTuning:
    """The trained part of some blocks of one model; everything else in those blocks is frozen.

    Args:
        model: whose blocks they are; changed in place.
        blocks: name of each block in the full model, with the dot (``model.layers.3.``) -> block.
        settings: method and its settings.

    Raises:
        ConfigError: if the method finds nothing to train.
        UnsupportedModelError: if a prefix cannot be put into this family's attention.
    """

    def __init__(
        self, model: Any, blocks: Mapping[str, nn.Module], settings: MethodSettings
    ) -> None:
        self.settings = settings
        self.blocks = dict(blocks)
        row = METHODS[settings.method]
        self._named: dict[str, nn.Parameter] = {}
        for prefix, block in self.blocks.items():
            if any(hasattr(block, name) for name in _MARKS) or _lora_layers(block):
                raise ConfigError(
                    f"method={settings.method!r}: {prefix[:-1]} carries modules already"
                )
            for parameter in block.parameters():
                parameter.requires_grad_(False)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive_seed(settings.seed, "models.adapter_methods", prefix))
                chosen = row(model, block, settings)
            for name, parameter in block.named_parameters():
                if id(parameter) in chosen:
                    parameter.requires_grad_(True)
                    self._named[prefix + name] = parameter
        if not self._named:
            raise ConfigError(f"method={settings.method!r}: nothing to train in {list(blocks)}")

    @property
    def method(self) -> str:
        """The method's name."""
        return self.settings.method

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return what is trained, by its name in the full model."""
        return dict(self._named)

    def parameters(self) -> list[nn.Parameter]:
        """Return what an optimizer should update."""
        return list(self._named.values())

    def count(self) -> int:
        """Return the number of trained weights."""
        return sum(p.numel() for p in self._named.values())

    def state(self) -> dict[str, Tensor]:
        """Return copies on the CPU of the trained tensors, by name, and of nothing else."""
        return {n: p.detach().to("cpu", copy=True) for n, p in self._named.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Set the trained tensors; all of them or none.

        Raises:
            ModelError: if a name is missing or unknown, or a tensor has another shape, is not
                floating point or not finite.
        """
        load_named(self._named, state)

    def dense(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what a state makes of the base's own tensors, by name; added modules have none.

        For fingerprints: LoRA's factors as the matrices that they change.
        """
        own = {name: state[name] for name in self._own if name in state}
        for prefix, block in self.blocks.items():
            for name, layer in _lora_layers(block).items():
                down = state[f"{prefix}{name}.lora_A.default.weight"].float()  # (r, in)
                up = state[f"{prefix}{name}.lora_B.default.weight"].float()  # (out, r)
                delta = layer.scaling["default"] * (up @ down)
                weight = layer.base_layer.weight.detach()
                turned = isinstance(layer.base_layer, Conv1D)
                change = (delta.T if turned else delta).to(weight.device, weight.dtype)
                own[f"{prefix}{name}.weight"] = weight + change
        return own

    @property
    def _own(self) -> set[str]:
        """Names of trained tensors that the base has itself."""
        return set(self._named) if self.method in ("full", "bitfit") else set()

    def fold(self) -> None:
        """Make the blocks plain again: LoRA's updates go into the weights that they act on.

        Raises:
            UnsupportedModelError: the method adds modules that no weight of the base can stand for.
        """
        if self.method in ("bottleneck", "prefix"):
            raise UnsupportedModelError(
                f"method={self.method!r}: its modules are not linear in the base's weights: the "
                "model cannot be written without them"
            )
        for block in self.blocks.values():
            for name, layer in _lora_layers(block).items():
                layer.merge()
                parent, _, child = name.rpartition(".")
                setattr(block.get_submodule(parent), child, layer.base_layer)
            if hasattr(block, "peft_config"):
                del block.peft_config
        if self.method == "lora":
            self._named = {}


def load_named(named: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]) -> None:
    """Set parameters from tensors of the same names; all of them or none.

    Raises:
        ModelError: if a name is missing or unknown, or a tensor has another shape, is not floating
            point where the parameter is, or not finite in the parameter's dtype.
    """
    missing, unknown = sorted(named.keys() - state.keys()), sorted(state.keys() - named.keys())
    if missing or unknown:
        raise ModelError(
            f"adapter state: missing {missing[:3]} ({len(missing)}), unknown {unknown[:3]} "
            f"({len(unknown)}): must be the {len(named)} names of what is trained in A"
        )
    for name, parameter in named.items():
        tensor = state[name]
        if tensor.shape != parameter.shape:
            raise ModelError(
                f"{name}: shape {tuple(tensor.shape)}: must be {tuple(parameter.shape)}"
            )
        if tensor.is_floating_point() != parameter.is_floating_point():
            raise ModelError(f"{name}: dtype {tensor.dtype}: must be like {parameter.dtype}")
        # After the cast: a finite float32 can be infinite in float16.
        if not bool(tensor.to(parameter.dtype).isfinite().all()):
            raise ModelError(f"{name}: must be finite in {parameter.dtype}")
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(state[name])


def _full(model: Any, block: nn.Module, settings: MethodSettings) -> set[int]:
    return {id(p) for p in block.parameters() if p.is_floating_point()}


def _bitfit(model: Any, block: nn.Module, settings: MethodSettings) -> set[int]:
    # Every vector: biases, and the norms' weights, since LLaMA's relatives have no biases at all.
    return {id(p) for p in block.parameters() if p.is_floating_point() and p.dim() == 1}


def _lora(model: Any, block: nn.Module, settings: MethodSettings) -> set[int]:
    from peft import LoraConfig, inject_adapter_in_model

    found = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    if not found:
        raise ConfigError(f"method='lora': {type(block).__name__} has no nn.Linear or Conv1D")
    before = {id(p) for p in block.parameters()}
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]
        # A regular expression is matched against the full name: no other module can slip in.
        target_modules="|".join(f"(?:{re.escape(name)})" for name in found),
        fan_in_fan_out=all(isinstance(m, Conv1D) for m in found.values()),
        bias="none",
    )
    inject_adapter_in_model(config, block)
    return {id(p) for p in block.parameters()} - before


def _bottleneck(model: Any, block: nn.Module, settings: MethodSettings) -> set[int]:
    return add_adapters(nn.ModuleList([block]), probe(model).hidden_size, settings.width)


def _prefix(model: Any, block: nn.Module, settings: MethodSettings) -> set[int]:
    before = {id(p) for p in block.parameters()}
    add_prefix(block, layout_of(model.config), settings.prefix, probe(model).hidden_size)
    return {id(p) for p in block.parameters()} - before


_MARKS = ("fedsplit_adapter", "fedsplit_prefix")


def _lora_layers(block: nn.Module) -> dict[str, Any]:
    found = {n: m for n, m in block.named_modules() if "default" in getattr(m, "lora_A", {})}
    return {name: layer for name, layer in found.items() if hasattr(layer, "base_layer")}


Choose = Callable[[Any, nn.Module, MethodSettings], set[int]]

# method -> (model, block, settings) -> ids of the block's parameters to train
METHODS: dict[str, Choose] = {
    "full": _full,
    "lora": _lora,
    "bottleneck": _bottleneck,
    "bitfit": _bitfit,
    "prefix": _prefix,
}
