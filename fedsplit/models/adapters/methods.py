"""What is trained inside chosen blocks of a model: the blocks themselves, or a small part of them.

For offsite tuning: the chosen blocks are A.  The same modules go into the emulator's A at the owner
and into the full model's at the server, and only what is trained travels, by its name in the full
model.  Every method starts as the identity: attaching it changes no output.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedsplit.errors import ConfigError, UnsupportedModelError
from fedsplit.models.adapters.bottleneck import BOTTLENECK
from fedsplit.models.adapters.lora import LORA, lora_layers, merged_weight
from fedsplit.models.adapters.method import AdapterMethod, MethodSettings, load_named
from fedsplit.models.adapters.own_weights import BITFIT, FULL
from fedsplit.models.adapters.prefix import PREFIX
from fedsplit.registry import pick
from fedsplit.seeding import derive_seed

__all__ = [
    "METHODS",
    "AdapterMethod",
    "BlockTuning",
    "MethodSettings",
    "check_method",
    "load_named",
]

METHODS: dict[str, AdapterMethod] = {
    "full": FULL,
    "lora": LORA,
    "bottleneck": BOTTLENECK,
    "bitfit": BITFIT,
    "prefix": PREFIX,
}
"""The family's table; a new method is a file here and one row."""


def check_method(blocks: Iterable[nn.Module], settings: MethodSettings) -> None:
    """Refuse settings of a method that do not fit the blocks; changes nothing.

    Raises:
        ConfigError: an unknown method, or settings that the blocks cannot serve.
    """
    row = pick(METHODS, settings.method, "method")
    if row.check is not None:
        row.check(blocks, settings)


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
        self.row = pick(METHODS, settings.method, "method")
        self._named: dict[str, nn.Parameter] = {}
        marks = [row.mark for row in METHODS.values() if row.mark]
        for prefix, block in self.blocks.items():
            if any(hasattr(block, mark) for mark in marks) or lora_layers(block):
                raise ConfigError(
                    f"method={settings.method!r}: {prefix[:-1]} carries modules already"
                )
        check_method(self.blocks.values(), settings)
        for prefix, block in self.blocks.items():
            for parameter in block.parameters():
                parameter.requires_grad_(False)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive_seed(settings.seed, "models.adapter_methods", prefix))
                chosen = self.row.choose(model, block, settings)
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

        For fingerprints: LoRA's factors, and DoRA's magnitudes, as the matrices that they change.
        They are on the CPU, as states are.
        """
        own = {name: state[name] for name in self._own if name in state}
        for prefix, block in self.blocks.items():
            for name, layer in lora_layers(block).items():
                own[f"{prefix}{name}.weight"] = merged_weight(layer, state, prefix + name)
        return own

    @property
    def _own(self) -> set[str]:
        """Names of trained tensors that the base has itself."""
        return set(self._named) if self.row.own else set()

    def fold(self) -> None:
        """Make the blocks plain again: LoRA's updates go into the weights that they act on.

        Raises:
            UnsupportedModelError: the method adds modules that no weight of the base can stand for.
        """
        if not self.row.foldable:
            raise UnsupportedModelError(
                f"method={self.method!r}: its modules are not linear in the base's weights: the "
                "model cannot be written without them"
            )
        for block in self.blocks.values():
            for name, layer in lora_layers(block).items():
                layer.merge()
                parent, _, child = name.rpartition(".")
                setattr(block.get_submodule(parent), child, layer.base_layer)
            if hasattr(block, "peft_config"):
                del block.peft_config
        if not self.row.own:
            self._named = {}
