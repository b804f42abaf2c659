"""A top's head as a module of its own, for a head that stays with the data owner (U-shape)."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from fedsplit.errors import UnsupportedModelError, check
from fedsplit.models.anatomy import probe
from fedsplit.models.modes import probing
from fedsplit.models.splitting.equivalence import TOLERANCE, padded_batch, relative_difference
from fedsplit.models.splitting.halves import Top, Upper
from fedsplit.models.splitting.structure import Pass, Slot, cut, mirror, strip


class Head(Upper):
    """What a top does after its final hidden state: ``head(hidden (B, T, d'), mask) -> logits``.

    For BERT-like classifiers that is pooler and classifier, for decoders the score layer and the
    pooling of the last token, for language models the vocabulary projection.  With ``blocks`` the
    last blocks go before it (a tail).

    Attributes:
        blocks: number of last blocks that it holds.
        source: name of the module whose output is the final hidden state; None: the last block.
        tuple_length: how many values the family's blocks return; 0: a tensor.
    """

    blocks: int = 0
    source: str | None = None
    tuple_length: int = 0


def detach_head(top: Top, *, blocks: int = 0, share: bool = False) -> Head:
    """Return the head of ``top``, with its last blocks if asked for.

    ``head(top.hidden_states(h, mask, tail=blocks), mask)`` equals ``top(h, mask)``; checked before
    returning.

    Args:
        top: from :func:`fedsplit.models.splitting.halves.split`, without adapters.
        blocks: last blocks that the head holds; one block at least stays below them.
        share: hold the top's own parameters instead of copies of them.

    Raises:
        ConfigError: ``blocks`` out of range.
        UnsupportedModelError: if the module that produces the final hidden state cannot be told.
    """
    most = probe(top.model).num_layers - 1
    check(0 <= blocks <= most, "blocks", blocks, f"in 0..{most} (one stays below the tail)")
    try:
        head = _cut_tail(top, blocks) if blocks else _cut_head(top)[0]
        _check(top, head)
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(top.model).__name__}: its head does not run alone: {error}"
        ) from error
    if not share:
        for module in head.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                copy = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                setattr(module, name, copy)
    return head


def head_parameters(top: Top) -> set[int]:
    """Return the ids of the parameters of ``top`` that act after its final hidden state.

    Raises:
        UnsupportedModelError: if the module that produces the final hidden state cannot be told.
    """
    return _cut_head(top)[1]


def positions_read(head: Upper) -> str:
    """Return which final hidden states of a right-padded text the head's logits depend on.

    ``first`` or ``last`` (the last that the mask keeps): that row alone, given as a text of one
    token, yields the very same logits; ``all``: anything else, and every head with a row of logits
    per token (language models, classifiers of tokens).  Found by
    the gradient of the logits, then checked on the row alone.
    """
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(*mask.shape, head.hidden_size, generator=generator)
    with probing(head):
        hidden.requires_grad_()
        logits = head(hidden, mask)
        if logits.ndim == 3:
            return "all"
        (gradient,) = torch.autograd.grad(logits.square().sum(), hidden)
        read = gradient.abs().amax(dim=2) > 0  # (3, 5)
        for name, at in (("first", torch.zeros(3, dtype=torch.int64)), ("last", mask.sum(1) - 1)):
            only = nn.functional.one_hot(at, mask.shape[1]).bool()
            if not torch.equal(read.cpu(), only):
                continue
            rows = hidden.detach()[only][:, None]  # (3, 1, d)
            alone = head(rows, torch.ones(3, 1, dtype=torch.int64))
            bound = TOLERANCE.get(next(head.parameters()).dtype, 3e-2)
            if relative_difference(logits.detach(), alone.detach()) <= bound:
                return name
    return "all"


def select_positions(states: Tensor, mask: Tensor, positions: str) -> Tensor:
    """Return the rows of ``states`` (B, T, d) that a head reads.

    Args:
        states: final hidden states.
        mask: (B, T), right-padded.
        positions: see :func:`positions_read`.

    Returns:
        (B, d) for ``first`` and ``last``, (kept tokens, d) for ``all``.
    """
    mask = mask.to(states.device)
    if positions == "first":
        return states[:, 0]
    if positions == "last":
        return states[torch.arange(len(states), device=states.device), mask.sum(1) - 1]
    return states[mask.bool()]


def _cut_tail(top: Top, blocks: int) -> Head:
    anatomy = probe(top.model)
    kept = mirror(nn.ModuleList(list(anatomy.blocks)[-blocks:]))
    model = cut(top.model, list(kept), slice(-blocks, None))
    slot = Slot()
    probe(model).blocks[0].register_forward_pre_hook(slot.before, with_kwargs=True)
    head = Head(model, slot)
    head.blocks = blocks
    strip(model, head.learn_outputs())
    return head


def _cut_head(top: Top) -> tuple[Head, set[int]]:
    anatomy = probe(top.model)
    source, tuple_length, width = _final_module(top)
    last = anatomy.blocks[-1]
    model = cut(top.model, [Pass(last, tuple_length)], slice(-1, None))
    slot = Slot()
    if source is None:
        probe(model).blocks[0].register_forward_pre_hook(slot.before, with_kwargs=True)
    else:
        made_by = model.get_submodule(source)
        made_by.register_forward_hook(slot.after)
    head = Head(model, slot)
    head.hidden_size, head.source, head.tuple_length = width, source, tuple_length
    used = head.learn_outputs()
    strip(model, used)
    if source is not None and model.get_submodule(source) is not made_by:
        # A projection that made the final state (OPT) has become a stub, without the hook.
        model.get_submodule(source).register_forward_hook(slot.after)
    return head, used


def _final_module(top: Top) -> tuple[str | None, int, int]:
    """Find who makes the final hidden state: None for the last block, else a module's name."""
    model = top.model
    anatomy = probe(model)
    prefix = anatomy.blocks_path + "."
    outputs: list[tuple[str, Tensor]] = []
    tuple_length = 0

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal tuple_length
            if module is anatomy.blocks[-1]:
                tuple_length = len(output) if isinstance(output, tuple) else 0
                output = output[0] if tuple_length else output
            if isinstance(output, Tensor):
                outputs.append((name, output))

        return hook

    device = next(model.parameters()).device
    mask = padded_batch(1, device)[1]
    hidden = _noise(top, mask)
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if module is anatomy.blocks[-1] or not (name + ".").startswith(prefix):
                hooks.enter_context(module.register_forward_hook(watch(name)))
        with probing(top), torch.no_grad():
            final = top.hidden_states(hidden, mask)
    for name, output in outputs:
        # Families reshape in between (GPT-2): the same memory is the same state.
        if output.data_ptr() == final.data_ptr() and output.shape == final.shape:
            source = None if (name + ".").startswith(prefix) else name
            return source, tuple_length, int(final.shape[-1])
    raise UnsupportedModelError(
        f"{type(model).__name__}: looked for the module whose output is the final hidden state, "
        f"found none among {sorted({n for n, _ in outputs})}"
    )


def _noise(top: Top, mask: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*mask.shape, top.hidden_size, generator=generator)


def _check(top: Top, head: Head) -> None:
    parameter = next(top.parameters())
    mask = padded_batch(1, torch.device("cpu"))[1]
    with probing(top, head), torch.no_grad():
        hidden = _noise(top, mask)
        expected = top(hidden, mask)
        got = head(top.hidden_states(hidden, mask, tail=head.blocks), mask)
    same = expected.shape == got.shape
    difference = relative_difference(expected, got) if same else float("inf")
    bound = TOLERANCE.get(parameter.dtype, 3e-2)
    if not difference <= bound:
        raise UnsupportedModelError(
            f"{type(top.model).__name__}: the head alone differs from the top by {difference:.3g} "
            f"of the largest logit: must be <= {bound:g} for {parameter.dtype}"
        )
