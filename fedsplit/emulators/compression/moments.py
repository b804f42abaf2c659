"""Second moments of what goes into, and what gradients come out of, linear layers of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedsplit.emulators.compression.structure import Model
from fedsplit.emulators.lm import check_tokens, lm_loss, logits_of
from fedsplit.models.anatomy import probe
from fedsplit.models.modes import evaluating, frozen


@dataclass
class Moments:
    """Sums over all calibration tokens, for one linear layer y = W x.

    Attributes:
        inputs: sum of x x^T, (n, n); None where only channels were asked for.
        gradients: sum of g g^T with g = d loss / d y, (m, m); None likewise.
        taylor: sum of (x_k d loss / d x_k)^2, (n,); None where matrices were asked for.
    """

    inputs: Tensor | None = None
    gradients: Tensor | None = None
    taylor: Tensor | None = None


def collect(
    model: Model,
    tokens: Tensor,
    matrices: Sequence[tuple[int, str]],
    channels: Sequence[tuple[int, str]],
    batch_size: int = 8,
) -> dict[tuple[int, str], Moments]:
    """Run the language-model loss forward and back, once, and sum up moments.

    Args:
        model: left as it was; no parameter gets a gradient.
        tokens: ids (N, T).
        matrices: (block, layer name) whose ``inputs`` and ``gradients`` are wanted.
        channels: (block, layer name) whose ``taylor`` is wanted.
        batch_size: token blocks at a time.

    Raises:
        DataError: if tokens are not ids (N, T).
    """
    check_tokens("tokens", tokens)
    anatomy = probe(model)
    found = {key: Moments() for key in (*matrices, *channels)}
    hooks = [(anatomy.input_embeddings, _track)]
    for keys, make in ((matrices, _matrix_hook), (channels, _channel_hook)):
        hooks += [(anatomy.blocks[i].get_submodule(n), make(found[i, n])) for i, n in keys]
    device = next(model.parameters()).device
    with ExitStack() as stack:
        for layer, hook in hooks:
            stack.enter_context(layer.register_forward_hook(hook))
        stack.enter_context(frozen(model))
        stack.enter_context(torch.enable_grad())
        for ids in torch.split(tokens, batch_size):
            ids = ids.to(device)
            lm_loss(logits_of(model, ids), ids, "sum").backward()  # type: ignore[no-untyped-call]
    return found


@torch.no_grad()
def collect_inputs(
    model: Model, tokens: Tensor, layers: Sequence[tuple[int, str]], batch_size: int = 8
) -> dict[tuple[int, str], Tensor]:
    """Run forward once and return the sum of x x^T, (n, n) float64, of what enters each layer.

    Args:
        model: left as it was.
        tokens: ids (N, T).
        layers: (block, layer name).
        batch_size: token blocks at a time.

    Raises:
        DataError: if tokens are not ids (N, T).
    """
    check_tokens("tokens", tokens)
    blocks = probe(model).blocks
    found = {key: Moments() for key in layers}
    device = next(model.parameters()).device
    with ExitStack() as stack:
        for (i, name), into in found.items():
            layer = blocks[i].get_submodule(name)
            stack.enter_context(layer.register_forward_pre_hook(_input_hook(into)))
        stack.enter_context(evaluating(model))
        for ids in torch.split(tokens, batch_size):
            logits_of(model, ids.to(device))
    return {key: m.inputs for key, m in found.items() if m.inputs is not None}


def _input_hook(into: Moments) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        # In float32 a few large directions would leave noise in place of all small ones.
        x = args[0].double().flatten(0, -2)  # (tokens, n)
        into.inputs = _add(into.inputs, x.T @ x)

    return hook


def _track(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    # Nothing requires gradients in a frozen model; from here on everything is tracked.
    return output.detach().requires_grad_().clone()


def _matrix_hook(into: Moments) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        x = args[0].detach().float().flatten(0, -2)  # (tokens, n)
        into.inputs = _add(into.inputs, x.T @ x)

        def back(gradient: Tensor) -> None:
            g = gradient.float().flatten(0, -2)  # (tokens, m)
            into.gradients = _add(into.gradients, g.T @ g)

        output.register_hook(back)  # type: ignore[no-untyped-call]

    return hook


def _channel_hook(into: Moments) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        x = args[0]
        value = x.detach()  # a hook that held x itself would keep its whole graph alive for good

        def back(gradient: Tensor) -> None:
            product = (value * gradient).float().flatten(0, -2)  # (tokens, n)
            into.taylor = _add(into.taylor, product.pow(2).sum(0))

        x.register_hook(back)

    return hook


def _add(total: Tensor | None, more: Tensor) -> Tensor:
    more = more.double().cpu()
    return more if total is None else total + more
