"""Models cut in width or in depth, before whatever training follows the cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedsplit.emulators.lm import logits_of
from fedsplit.errors import UnsupportedModelError
from fedsplit.models.anatomy import probe
from fedsplit.models.layout.projections import BlockLayout, Site, block_prefixes, layout_of
from fedsplit.models.loading import HEADS
from fedsplit.models.modes import evaluating
from fedsplit.models.splitting.structure import with_blocks

ROWS = 8  # token blocks run at a time


def cut_width(model: Any, share: float, ids: Tensor) -> Any:
    """Return a model of fewer residual directions and hidden units, as Sheared LLaMA and Minitron.

    What public text uses most is kept (Minitron, arXiv 2407.14679, section 2.2): the directions
    with the largest activations where the blocks' projections read the residual stream, and each
    block's hidden units with the largest activations, both as :func:`activations` tells.  Heads
    stay.

    Args:
        model: not changed.
        share: of directions and of hidden units that is kept, in (0, 1).
        ids: public text, (N, T).

    Raises:
        UnsupportedModelError: the family cannot be built with a narrower residual stream and the
            same heads, or does not say how many hidden units it has; names the family.
    """
    narrow, layout = _narrower(model, share)
    state, target = model.state_dict(), narrow.state_dict()
    prefixes = block_prefixes(layout, state)
    used = activations(model, layout, prefixes, ids)
    whole, width = (probe(m).hidden_size for m in (model, narrow))
    keep = _largest(used.directions, width)
    down = layout.down
    axes = {down.weight: 0 if down.transposed else 1}  # of hidden units
    for site in (layout.up, layout.gate):
        if site is not None:
            axes[site.weight] = 1 if site.transposed else 0
            axes |= {site.bias: 0} if site.bias else {}
    units = {
        prefix + name: (axis, _largest(used.units[prefix], target[prefix + name].shape[axis]))
        for prefix in prefixes
        for name, axis in axes.items()
    }
    for name, wanted in target.items():
        part = state[name]
        for axis, (old, new) in enumerate(zip(part.shape, wanted.shape, strict=True)):
            if name in units and units[name][0] == axis:
                part = part.index_select(axis, units[name][1])
            elif (old, new) == (whole, width):
                part = part.index_select(axis, keep)
            elif old != new:
                raise _unfit(model, f"{name} of {old} becomes one of {new}")
        wanted.copy_(part)  # a state's tensors are detached
    return narrow.eval()


def _narrower(model: Any, share: float) -> tuple[Any, BlockLayout]:
    """Return a model of fewer directions and hidden units, not filled yet, and the whole's layout.

    Raises:
        UnsupportedModelError: there is none with the same heads.
    """
    layout = layout_of(model.config)
    config = type(model.config).from_dict(model.config.to_dict())
    for name in ("hidden_size", "intermediate_size"):
        found = getattr(config, name, None)
        if not isinstance(found, int):
            raise _unfit(model, f"{name}={found!r} in its config")
        setattr(config, name, int(found * share))
    config.head_dim = layout.head_dim
    try:
        narrow = HEADS["causal-lm"].from_config(config, dtype=model.dtype)
        now = layout_of(config)
    except (ValueError, RuntimeError) as error:
        raise _unfit(model, str(error)) from error
    if (now.heads, now.kv_heads, now.head_dim) != (layout.heads, layout.kv_heads, layout.head_dim):
        raise _unfit(model, f"heads of {layout.head_dim} become {now.heads} of {now.head_dim}")
    for site in (layout.up, layout.gate, layout.down):
        if site is not None and (site.rows is not None or len(layout.shapes[site.weight]) != 2):
            raise _unfit(model, f"{site.weight} is stacked or holds more than one projection")
    return narrow, layout


def _unfit(model: Any, found: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(model).__name__} (model_type={model.config.model_type!r}): looked for a width that "
        f"can be cut beside heads that stay (hidden_size, intermediate_size, head_dim), found: "
        f"{found}"
    )


@dataclass(frozen=True)
class Activations:
    """How much text uses a model's directions and hidden units.

    Attributes:
        directions: (d,), see :func:`activations`.
        units: (I,) for each block, by its prefix.
    """

    directions: Tensor
    units: Mapping[str, Tensor]


def activations(model: Any, layout: BlockLayout, prefixes: list[str], ids: Tensor) -> Activations:
    """Return root mean squares over tokens: of what enters Q and up, summed, and what enters down.

    Args:
        model: a causal language model; run in evaluation mode.
        layout: its blocks'.
        prefixes: of its blocks' parameters.
        ids: (N, T).
    """
    squares: dict[tuple[str, str], Tensor] = {}
    handles = []

    def watch(prefix: str, role: str, site: Site) -> None:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found = args[0].float().flatten(0, -2).square().sum(0)
            squares[prefix, role] = squares.get((prefix, role), 0) + found

        owner = model.get_submodule((prefix + site.weight).rpartition(".")[0])
        handles.append(owner.register_forward_pre_hook(add))

    for prefix in prefixes:
        for role in ("q", "up", "down"):
            watch(prefix, role, getattr(layout, role))
    try:
        with evaluating(model), torch.no_grad():
            for part in torch.split(ids, ROWS):
                logits_of(model, part)
    finally:
        for handle in handles:
            handle.remove()
    means = {at: (found / ids.numel()).sqrt() for at, found in squares.items()}
    read = [found for (_, role), found in means.items() if role != "down"]
    return Activations(torch.stack(read).sum(0), {p: means[p, "down"] for p in prefixes})


def _largest(values: Tensor, count: int) -> Tensor:
    found: Tensor = values.topk(count).indices.sort().values
    return found


def drop_blocks(model: Any, every: int) -> Any:
    """Return a model without every ``every``-th of its blocks."""
    blocks = probe(model).blocks
    kept = [i for i in range(len(blocks)) if i % every != every - 1]
    short: Any = with_blocks(model, [blocks[i] for i in kept], kept)
    return short.eval()
