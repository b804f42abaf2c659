"""Cutting a Hugging Face model: structure copies that share tensors, stubs, unneeded parameters.

A half is the family's own code with part of its blocks.  Nothing here knows a family: which
parameters a half needs is read off the autograd graph of a tiny forward pass.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedsplit.errors import UnsupportedModelError
from fedsplit.models.anatomy import probe

M = TypeVar("M", bound=nn.Module)


class Reached(Exception):
    """Private: carries a hidden state out of the family's forward, which then runs no further."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__("reached the cut")
        self.hidden = hidden


def hidden_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the hidden states among a block's arguments, however the family passes them."""
    value = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(value, Tensor):
        raise UnsupportedModelError(
            "looked for hidden states as a block's first argument or as hidden_states=, found "
            f"{type(value).__name__} and the keywords {sorted(kwargs)}"
        )
    return value


def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Stop the forward before a block, with the hidden states it would have received (a hook)."""
    raise Reached(hidden_argument(args, kwargs))


class Exit(nn.Module):
    """Stands in for block k of a bottom: hands over its input and stops the forward there."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        _copy_plain_attributes(block, self)

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """Raise :class:`Reached` with the hidden states this block would have received."""
        raise Reached(hidden_argument(args, kwargs))


class Pass(nn.Module):
    """Stands in for all blocks of a head: returns what it received, in the family's format."""

    def __init__(self, block: nn.Module, tuple_length: int) -> None:
        super().__init__()
        _copy_plain_attributes(block, self)
        self._tuple_length = tuple_length

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the hidden states, as a tuple where the family's blocks return tuples."""
        hidden = hidden_argument(args, kwargs)
        return (hidden, *[None] * (self._tuple_length - 1)) if self._tuple_length else hidden


def _copy_plain_attributes(source: nn.Module, target: nn.Module) -> None:
    # Some families read settings off a block from outside (ModernBERT: layer.attention_type).
    for name, value in vars(source).items():
        plain = value is None or isinstance(value, str | int | float)
        if plain and not name.startswith("_") and name != "training":
            setattr(target, name, value)


class ZeroEmbedding(nn.Module):
    """Zeros in the shape of an embedding that this half does not own."""

    weight: Tensor

    def __init__(self, like: nn.Embedding) -> None:
        super().__init__()
        self.num_embeddings = like.num_embeddings
        self.embedding_dim = like.embedding_dim
        self.padding_idx = like.padding_idx
        # Empty, but follows .to(): code that asks for weight.dtype or .device keeps working.
        self.register_buffer("weight", like.weight.new_zeros(0, like.embedding_dim), False)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Map ids (...) to zeros (..., embedding_dim)."""
        # OPT's takes the mask of all tokens first, and the positions of the new ones by name.
        named = kwargs.get("position_ids")
        tensors = (named, *args, *kwargs.values())
        ids = next(x for x in tensors if isinstance(x, Tensor))
        return self.weight.new_zeros(*ids.shape, self.embedding_dim, device=ids.device)


class ZeroLinear(nn.Module):
    """Zeros in the shape of a projection that this half does not own."""

    weight: Tensor

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        matrix = like.weight
        assert isinstance(matrix, Tensor)
        out = matrix.shape[1] if isinstance(like, Conv1D) else matrix.shape[0]
        self.out_features = int(out)
        self.register_buffer("weight", matrix.new_zeros(0), False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to zeros (..., out)."""
        return x.new_zeros(*x.shape[:-1], self.out_features)


class Slot:
    """Where a half lays the hidden states that its first block shall receive, one per thread."""

    def __init__(self) -> None:
        self._waiting: dict[int, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Slot:
        return Slot()

    @contextmanager
    def holding(self, hidden: Tensor) -> Iterator[None]:
        """Offer ``hidden`` to this thread's forward pass.

        Raises:
            UnsupportedModelError: if the forward pass ended without taking it.
        """
        me = threading.get_ident()
        self._waiting[me] = hidden
        try:
            yield
            if me in self._waiting:
                raise UnsupportedModelError("the model's forward never ran the block at the cut")
        finally:
            self._waiting.pop(me, None)

    def _take(self, like: Tensor) -> Tensor:
        hidden = self._waiting.pop(threading.get_ident(), None)
        if hidden is None:
            raise UnsupportedModelError(
                "the block at the cut ran without or twice per hidden state: call the half, not "
                "the model inside it"
            )
        if hidden.shape != like.shape:
            raise UnsupportedModelError(
                f"hidden {tuple(hidden.shape)}: this family's block takes {tuple(like.shape)} here"
            )
        return hidden.to(device=like.device, dtype=like.dtype)

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Replace the module's input by the waiting hidden states (a forward pre-hook)."""
        hidden = self._take(hidden_argument(args, kwargs))
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
        """Replace the module's output by the waiting hidden states (a forward hook)."""
        return self._take(output)


def mirror(module: M, replace: dict[nn.Module, nn.Module] | None = None) -> M:
    """Copy the structure of ``module``; parameters and buffers stay the very same tensors."""
    memo: dict[int, Any] = {id(t): t for t in (*module.parameters(), *module.buffers())}
    memo.update({id(old): new for old, new in (replace or {}).items()})
    return copy.deepcopy(module, memo)


def with_blocks(
    model: PreTrainedModel, blocks: Sequence[nn.Module], positions: Sequence[int]
) -> PreTrainedModel:
    """Return the structure of ``model`` around other blocks; tensors stay the very same.

    Per-layer settings in the configuration are cut to ``positions``, one position of the model's
    own blocks for each new block; the cache is off.
    """
    anatomy = probe(model)
    made = mirror(model, {anatomy.blocks: nn.ModuleList(blocks)})
    for config in configs_outside(made, anatomy.blocks_path):
        _select_layers(config, anatomy.num_layers, positions)
    for module in made.modules():
        # A stochastically skipped block would skip the cut, or make another model at each step.
        if isinstance(getattr(module, "layerdrop", None), float):
            module.layerdrop = 0.0  # type: ignore[assignment]
    return made


def cut(model: PreTrainedModel, blocks: list[nn.Module], keep: slice) -> PreTrainedModel:
    """Return ``model`` around other ``blocks``, its configuration shortened to match.

    Args:
        model: not changed.
        blocks: modules for the new block list.
        keep: which of the per-layer settings (layer types and the like) the new list gets.
    """
    anatomy = probe(model)
    half = with_blocks(model, blocks, range(anatomy.num_layers)[keep])
    for config in configs_outside(half, anatomy.blocks_path):
        config.tie_word_embeddings = False
    # Nothing is tied from here on: a later tie_weights() must not look for the removed embedding.
    if hasattr(half, "all_tied_weights_keys"):
        half.all_tied_weights_keys = {}
    return half


def configs_outside(model: PreTrainedModel, blocks_path: str) -> list[PreTrainedConfig]:
    """Return each configuration object that modules outside the blocks hold, once."""
    found: dict[int, PreTrainedConfig] = {}
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig) and not name.startswith(blocks_path + "."):
            for one in (config, config.get_text_config()):
                found[id(one)] = one
    return list(found.values())


def _select_layers(config: PreTrainedConfig, layers: int, positions: Sequence[int]) -> None:
    if getattr(config, "num_hidden_layers", None) == layers:
        for name, value in list(vars(config).items()):
            if "layer" in name and isinstance(value, list | tuple) and len(value) == layers:
                setattr(config, name, type(value)(value[i] for i in positions))
        config.num_hidden_layers = len(positions)
    config.use_cache = False


def leaves_of(output: Tensor) -> set[int]:
    """Return the ids of the leaf tensors in the autograd graph of ``output`` (no backward run)."""
    seen: set[Any] = set()
    stack: list[Any] = [output.grad_fn]
    leaves: set[int] = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            leaves.add(id(variable))
        stack.extend(n for n, _ in node.next_functions)
    return leaves


def strip(model: PreTrainedModel, needed: set[int]) -> None:
    """Remove every parameter outside the blocks whose id is not in ``needed``.

    Embeddings and projections become zero stubs; anything else keeps its code with zeros for
    weights, in non-persistent buffers, so what still runs (for nothing) keeps its shapes.
    """
    blocks = probe(model).blocks_path + "."
    for name, module in list(model.named_modules()):
        if (name + ".").startswith(blocks):
            continue
        own = [(n, p) for n, p in module.named_parameters(recurse=False) if p.is_floating_point()]
        useless = [(n, p) for n, p in own if id(p) not in needed]
        if not useless:
            continue
        whole_leaf = len(useless) == len(own) and name and not list(module.children())
        if whole_leaf and isinstance(module, nn.Embedding):
            model.set_submodule(name, ZeroEmbedding(module))
        elif whole_leaf and isinstance(module, nn.Linear | Conv1D):
            model.set_submodule(name, ZeroLinear(module))
        else:
            for leaf, parameter in useless:
                delattr(module, leaf)
                zeros = torch.zeros_like(parameter, requires_grad=False)
                module.register_buffer(leaf, zeros, persistent=False)
            zeroed = {*getattr(module, "_zeroed", ()), *(n for n, _ in useless)}
            object.__setattr__(module, "_zeroed", frozenset(zeroed))
