"""A small random model of a configuration's family, for :mod:`fedsplit.models.layout.probe`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from fedsplit.errors import UnsupportedModelError

# What the families' own code raises where a configuration's values make no model.
_NOT_BUILT = (ValueError, TypeError, AttributeError, RuntimeError, LookupError, ArithmeticError)


def probe_model(config: Any, blocks: int = 1) -> tuple[nn.Module, nn.Module]:
    """Build a random model of few blocks and a small vocabulary; return (model, its last block).

    Raises:
        UnsupportedModelError: if it cannot be built or its blocks cannot be found.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = _built(config, blocks)
    except _NOT_BUILT as error:
        raise UnsupportedModelError(
            f"model_type={config.model_type!r}: cannot build a small model to probe: {error}"
        ) from error
    lists = {
        n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == blocks
    }
    full = [n for n, m in lists.items() if any(True for _ in m[0].children())]
    outer = [n for n in full if not any(n.startswith(other + ".") for other in full)]
    if len(outer) != 1:
        raise UnsupportedModelError(
            f"model_type={config.model_type!r}: expected one list of {blocks} blocks, found "
            f"{sorted(lists)}"
        )
    return model.eval().float(), lists[outer[0]][-1]


def probed_size(config: Any) -> int:
    """Return how many parameters :func:`probe_model` would make room for, without making it.

    0 where the family cannot be laid out without memory, or not at all.
    """
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in _built(config, 1).parameters())
    except (*_NOT_BUILT, NotImplementedError):
        return 0


def _built(config: Any, blocks: int) -> nn.Module:
    from transformers import AutoModel

    small = copy.deepcopy(config)
    depth = int(small.num_hidden_layers)
    small.num_hidden_layers = blocks
    for name, value in vars(small).items():
        if isinstance(value, list) and len(value) == depth > blocks:
            setattr(small, name, value[:blocks])
    small.vocab_size = 8
    for name in ("pad", "bos", "eos", "cls", "sep"):
        if getattr(small, f"{name}_token_id", None) is not None:
            setattr(small, f"{name}_token_id", 0)
    small.use_cache = False
    build = cast(Callable[..., nn.Module], AutoModel.from_config)
    return build(small, attn_implementation="eager")
