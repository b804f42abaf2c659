"""Structure of emulators: other blocks in a model, storage of their own, a tiny forward.

Everything goes through :mod:`fedsplit.models`; a model is a Hugging Face model, typed ``Any`` here
because only that package names transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fedsplit.errors import UnsupportedModelError, check
from fedsplit.models.anatomy import probe
from fedsplit.models.modes import evaluating
from fedsplit.models.splitting import structure
from fedsplit.models.splitting.equivalence import padded_batch

Model: TypeAlias = Any


def with_blocks(model: Model, blocks: Sequence[nn.Module], positions: Sequence[int]) -> Model:
    """Return the structure of ``model`` around other blocks; tensors stay the very same.

    Per-layer settings in the configuration are cut to ``positions``, ``use_cache`` is False, and
    ``layer_idx`` inside the blocks counts from 0 again, unless that would change what the model
    computes (the cache is off, so nothing else reads it).

    Args:
        model: not changed.
        blocks: the new blocks, none of them part of ``model`` itself (``layer_idx`` is written).
        positions: for each block, the base position whose per-layer settings it runs under.

    Raises:
        ConfigError: if the two differ in length or there is none.
    """
    check(len(blocks) == len(positions) > 0, "blocks", len(blocks), f"{len(positions)}, >= 1")
    made: Model = structure.with_blocks(model, blocks, positions)
    _renumber(made)
    return made


def _renumber(model: Model) -> None:
    blocks = probe(model).blocks
    holders = [
        (module, index)
        for index, block in enumerate(blocks)
        for module in block.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
    ]
    before = [module.layer_idx for module, _ in holders]
    if before == [index for _, index in holders]:
        return
    expected = tiny_logits(model)
    for module, index in holders:
        module.layer_idx = index  # type: ignore[assignment]
    if expected is not None and not _same(expected, tiny_logits(model)):
        for (module, _), old in zip(holders, before, strict=True):
            module.layer_idx = old


def _same(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and torch.equal(a.nan_to_num(), b.nan_to_num())


class OwnStorage:
    """Gives modules storage of their own; what was tied before is tied afterwards.

    Use one instance for all parts of a model, so that ties between parts survive.
    """

    def __init__(self) -> None:
        # The old tensors are kept alive: an id in use twice would tie strangers.
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}

    def take(self, module: nn.Module) -> None:
        """Replace every parameter and buffer of ``module`` by its copy, in place."""
        for part in module.modules():
            for name, parameter in list(part._parameters.items()):
                if parameter is not None:
                    part._parameters[name] = self._copy(parameter)  # type: ignore[assignment]
            for name, buffer in list(part._buffers.items()):
                if buffer is not None:
                    part._buffers[name] = self._copy(buffer)

    def keep_only(self, modules: Iterable[nn.Module]) -> None:
        """Let go of every tensor seen so far but those of ``modules``, which are copies already.

        What was tied to a tensor that is let go is not tied to what comes later.
        """
        kept = (t for m in modules for t in (*m.parameters(), *m.buffers()))
        self._copies = {id(t): (t, t) for t in kept}

    def _copy(self, old: Tensor) -> Tensor:
        if id(old) not in self._copies:
            new: Tensor = old.detach().clone()
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(new, old.requires_grad)
            self._copies[id(old)] = (old, new)
            self._copies[id(new)] = (new, new)
        return self._copies[id(old)][1]


def is_meta(model: nn.Module) -> bool:
    """Return whether ``model`` is laid out without memory."""
    return next(model.parameters()).is_meta


def tiny_batch(model: Model) -> tuple[Tensor, Tensor]:
    """Return padded ids and mask (3, 5) that ``model`` accepts."""
    config = model.config.get_text_config()
    rows = getattr(probe(model).input_embeddings, "num_embeddings", None)
    if not isinstance(rows, int):
        raise UnsupportedModelError(f"{type(model).__name__}: no nn.Embedding of tokens")
    return padded_batch(rows, next(model.parameters()).device, config.pad_token_id)


@torch.no_grad()
def tiny_logits(model: Model) -> Tensor | None:
    """Return the logits (in evaluation mode) of a tiny padded batch; None on the meta device."""
    if is_meta(model):
        return None
    ids, mask = tiny_batch(model)
    with evaluating(model):
        logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits


@torch.no_grad()
def block_outputs(model: Model) -> list[Any]:
    """Return what each block returned, tensor or tuple, in a tiny forward pass.

    Raises:
        UnsupportedModelError: if the forward fails, or a block ran not once.
    """
    blocks = probe(model).blocks
    seen: dict[int, list[Any]] = {i: [] for i in range(len(blocks))}

    def keep(index: int) -> Any:
        return lambda _module, _args, output: seen[index].append(output)

    try:
        with ExitStack() as hooks:
            for i, block in enumerate(blocks):
                hooks.enter_context(block.register_forward_hook(keep(i)))
            tiny_logits(model)
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__}: its forward fails on a padded batch: {error}"
        ) from error
    for i, outputs in seen.items():
        if len(outputs) != 1:
            raise UnsupportedModelError(
                f"{type(model).__name__}: block {i} ran {len(outputs)} times, must run once"
            )
    return [outputs[0] for outputs in seen.values()]


def first(output: Any) -> Tensor:
    """Return the hidden states in what a block returned."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
