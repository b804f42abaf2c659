"""Building an emulator from a plan, and putting trained adapters back into the full model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fedsplit.emulators.compression.structure import Model, OwnStorage, with_blocks
from fedsplit.emulators.planning.plan import COMPRESS, HARMONIZER, SHARE, EmulatorPlan
from fedsplit.errors import ConfigError
from fedsplit.models.adapters.methods import BlockTuning, MethodSettings, load_named
from fedsplit.models.anatomy import probe
from fedsplit.models.layout.projections import tensors_of
from fedsplit.models.loading import weights_digest
from fedsplit.models.splitting.structure import mirror

Edit = Callable[[int, nn.Module], None]
Read = Callable[[int], AbstractContextManager[nn.Module]]
"""A block by its position, with its weights for as long as the context lasts."""


@dataclass
class Emulator:
    """What an owner trains: [A, E*], a Hugging Face model of its own.

    Attributes:
        model: evaluation mode, ``use_cache=False``; only A's parameters require gradients.
        plan: the part of every block of the base.
        method: name of the compressor.
        base_digest: of the base's weights, see :func:`fedsplit.models.loading.weights_digest`.
        details: what else it was built from (scores, errors, settings): plain JSON values.
        base_config: the base's whole configuration, as JSON values.
    """

    model: Model
    plan: EmulatorPlan
    method: str
    base_digest: str
    details: dict[str, Any] = field(default_factory=dict)
    base_config: dict[str, Any] = field(default_factory=dict)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """Return A's parameters under their names in the full model."""
        return _named(self.model, self.plan, full=False)

    def parameter_count(self) -> int:
        """Return the number of weights: parameters and codes, tied and shared ones once."""
        return sum(t.numel() for t in _weights(self.model))

    def byte_count(self) -> int:
        """Return the bytes of all weights, tied and shared ones once."""
        return sum(t.numel() * t.element_size() for t in _weights(self.model))

    def trainable_count(self) -> int:
        """Return the number of A's parameters."""
        return sum(p.numel() for p in self.adapter_parameters().values())


def _weights(model: nn.Module) -> list[Tensor]:
    codes = [b for n, b in model.named_buffers() if n.endswith((".codes", ".scale"))]
    return [*model.parameters(), *codes]


def build_emulator(
    model: Model,
    plan: EmulatorPlan,
    *,
    harmonizers: Mapping[int, nn.Module] | None = None,
    edit: Edit | None = None,
    method: str = "custom",
    base_digest: str | None = None,
    details: Mapping[str, Any] | None = None,
    read: Read | None = None,
) -> Emulator:
    """Build the emulator that ``plan`` describes; ``model`` is not changed.

    The emulator owns all its storage: training it never touches the base, and no dropped or
    replaced weight of the base stays reachable from it.  It still reveals, bit for bit, the
    embeddings, the head, the final norm, A, and the kept blocks.  A plan of nothing but adapters
    and kept blocks computes what the base computes, bit for bit.  Tied heads stay tied.

    Args:
        model: the base, a Hugging Face model.
        plan: for its number of blocks.
        harmonizers: by base position, for the blocks with that role (copied).
        edit: ``edit(position, block)`` changes in place a copy of each block with role "compress".
        method: recorded.
        base_digest: of ``model`` if it is known already; None: computed.
        details: recorded; JSON values.
        read: where the model's blocks have no weights: called once for each block that the
            emulator holds, in order, so that one of them is in memory at a time.

    Raises:
        ConfigError: if the plan is for another number of blocks, or a harmonizer or ``edit`` that
            it needs is not given.
        UnsupportedModelError: if the model's blocks cannot be told.
    """
    anatomy = probe(model)
    _check_layers(model, plan)
    ready = harmonizers or {}
    missing = [i for i in plan.having(HARMONIZER) if i not in ready]
    if missing:
        raise ConfigError(f"harmonizers: none for blocks {missing}, which the plan replaces")
    if plan.having(COMPRESS) and edit is None:
        raise ConfigError(f"edit=None: must change blocks {plan.having(COMPRESS)}")
    own = OwnStorage()
    made: dict[int, nn.Module] = {}
    for position in plan.positions:
        role = plan.roles[position]
        if role == SHARE:
            continue
        source = ready[position] if role == HARMONIZER else anatomy.blocks[position]
        given = nullcontext(source) if read is None or role == HARMONIZER else read(position)
        with given as block:
            made[position] = mirror(block)
            own.take(made[position])
        if role == COMPRESS and edit is not None:
            edit(position, made[position])
        if read is not None:
            own.keep_only(made.values())
    for position in plan.having(SHARE):
        made[position] = mirror(made[plan.source[position]])  # other module, the same weights
    result = with_blocks(model, [made[i] for i in plan.positions], plan.positions)
    own.take(result)
    emulator = Emulator(
        result.eval(),
        plan,
        method,
        weights_digest(model) if base_digest is None else base_digest,
        dict(details or {}),
        json.loads(model.config.to_json_string(use_diff=False)),
    )
    freeze_but_adapters(emulator)
    return emulator


def freeze_but_adapters(emulator: Emulator) -> None:
    """Let gradients reach A's float parameters and no others."""
    mine = {id(p) for p in emulator.adapter_parameters().values()}
    for parameter in emulator.model.parameters():
        trained = id(parameter) in mine and parameter.is_floating_point()
        parameter.requires_grad_(trained)


def adapter_state(emulator: Emulator) -> dict[str, Tensor]:
    """Return copies on the CPU of A's weights, by their names in the full model.

    LoRA layers that peft injected into A come back merged into the weights they act on.
    """
    return {
        name: tensor.detach().to("cpu", copy=True)
        for name, tensor in _merged(emulator.model, emulator.plan).items()
    }


def load_adapters(emulator: Emulator, state: Mapping[str, Tensor]) -> None:
    """Set A's weights in an emulator (the average of a round, say); all of them or none.

    Raises:
        ModelError: if a name is missing or unknown, or a tensor has another shape, is not floating
            point or not finite.
    """
    load_named(emulator.adapter_parameters(), state)


def plug_in(model: Model, state: Mapping[str, Tensor], plan: EmulatorPlan) -> dict[str, Tensor]:
    """Put trained adapters into the full model, in place, by name: M' = [A', E].

    All of them or none: nothing is written unless everything fits.

    Args:
        model: the base that the emulator was built from.
        state: from :func:`adapter_state`, or an average of such.
        plan: of the emulator.

    Returns:
        What the model held before, in the same form: plug it in to undo.

    Raises:
        ConfigError: if the plan is for another number of blocks.
        ModelError: if a name is missing or unknown, or a tensor has another shape, is not floating
            point or not finite in the model's dtype.
    """
    _check_layers(model, plan)
    named = _named(model, plan, full=True)
    before = {n: p.detach().to("cpu", copy=True) for n, p in named.items()}
    load_named(named, state)
    return before


def tune_inside(emulator: Emulator, settings: MethodSettings) -> BlockTuning:
    """Let only what a method trains be trained in an emulator's A; adds the method's modules.

    Raises:
        ConfigError: if the method finds nothing to train.
        UnsupportedModelError: if the method cannot be used in this family.
    """
    blocks = _blocks_of(emulator.model, emulator.plan, full=False)
    return BlockTuning(emulator.model, blocks, settings)


def tune_in_full(model: Model, plan: EmulatorPlan, settings: MethodSettings) -> BlockTuning:
    """Put a method's modules into A of the full model, where trained states are plugged in by key.

    The names are those of :func:`tune_inside` of an emulator with that plan.

    Raises:
        ConfigError: if the plan is for another number of blocks, or there is nothing to train.
        UnsupportedModelError: if the method cannot be used in this family.
    """
    _check_layers(model, plan)
    return BlockTuning(model, _blocks_of(model, plan, full=True), settings)


def _check_layers(model: Model, plan: EmulatorPlan) -> None:
    layers = probe(model).num_layers
    if plan.num_layers != layers:
        raise ConfigError(f"plan: {plan.num_layers} blocks: must be the model's {layers}")


def _blocks_of(model: Model, plan: EmulatorPlan, full: bool) -> dict[str, nn.Module]:
    anatomy = probe(model)
    places = range(plan.num_layers) if full else plan.positions
    where = {position: index for index, position in enumerate(places)}
    return {f"{anatomy.blocks_path}.{i}.": anatomy.blocks[where[i]] for i in plan.adapters}


def _named(model: Model, plan: EmulatorPlan, full: bool) -> dict[str, nn.Parameter]:
    return {
        prefix + name: parameter
        for prefix, block in _blocks_of(model, plan, full).items()
        for name, parameter in block.named_parameters()
    }


def _merged(model: Model, plan: EmulatorPlan) -> dict[str, Tensor]:
    return {
        prefix + name: tensor
        for prefix, block in _blocks_of(model, plan, full=False).items()
        for name, tensor in tensors_of(block).items()
    }
