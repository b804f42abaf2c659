"""Modes of modules: evaluation, without gradients, with all of them; activations kept or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Hold evaluation mode inside; restore every module's own mode afterwards."""
    modes = [(m, m.training) for top in modules for m in top.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _tracking(
    modules: tuple[nn.Module, ...], tracked: Callable[[nn.Parameter], bool]
) -> Iterator[None]:
    flags = [(p, p.requires_grad) for m in modules for p in m.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(tracked(parameter))
        with evaluating(*modules):
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Hold evaluation mode without gradients inside; restore the flags afterwards."""
    with _tracking(modules, lambda parameter: False):
        yield


@contextmanager
def probing(*modules: nn.Module) -> Iterator[None]:
    """Hold evaluation mode, every float parameter tracked by autograd; restore all flags."""
    with _tracking(modules, lambda p: p.is_floating_point()), torch.enable_grad():
        yield


def keep_no_activations(model: Any) -> None:
    """Let a Hugging Face model compute what is inside its blocks again in the backward pass.

    The kind that is not re-entrant: it finds gradients where nothing that enters needs any.

    Raises:
        ValueError: the family cannot.
    """
    # Older 5.x releases know the first name of it alone.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
