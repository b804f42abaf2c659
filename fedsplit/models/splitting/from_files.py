"""Both halves straight from a checkpoint's files: each reads what it holds, and nothing twice.

``load`` and ``split`` hold the whole model, in the dtype asked for, before anything is dropped.
Here the family's code is laid out without memory, and each half is given its own tensors, mapped
from the files where their dtype is the one asked for: what is never looked up or trained takes no
memory of its own, and a step on a tensor gives it some.  The halves, the digest and the check of
the law are those of ``load`` and ``split``, bit for bit.

This needs a plain checkpoint: every weight in the files under the model's own name.  Families whose
weights are converted on the way, new heads and quantised files are left to ``load``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedsplit.errors import UnsupportedModelError, check
from fedsplit.models.anatomy import probe
from fedsplit.models.loading import Described, describe, give_pad_token, label_settings, set_dropout
from fedsplit.models.shards import TensorFiles, weight_files
from fedsplit.models.splitting.equivalence import check_equivalence
from fedsplit.models.splitting.halves import Bottom, Top, make_bottom, make_top
from fedsplit.tasks import task_type


@dataclass(frozen=True)
class ReadHalves:
    """Halves read from files.

    Attributes:
        bottom: embeddings and blocks below the cut.
        top: the other blocks and the head.
        tokenizer: as :func:`fedsplit.models.loading.load` returns it.
        digest: the base's, see :func:`fedsplit.models.loading.weights_digest`.
    """

    bottom: Bottom
    top: Top
    tokenizer: Any
    digest: str


def read_halves(
    name_or_path: str | Path,
    task: str,
    k: int,
    *,
    num_labels: int | None = None,
    label_names: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
    attn: str | None = None,
    dropout: float | None = None,
    expected_sha256: str | None = None,
) -> ReadHalves | None:
    """Return the halves of a model cut before block ``k``, or None where it must be loaded whole.

    Args:
        name_or_path, task, num_labels, label_names, dtype, attn, dropout, expected_sha256: see
            :func:`fedsplit.models.loading.load`.
        k: see :func:`fedsplit.models.splitting.halves.split`.

    Raises:
        ConfigError, ModelError, UnsupportedModelError: as those two.
    """
    kind = task_type(task)
    labels = label_settings(kind, num_labels, label_names)
    found = describe(name_or_path, kind.head, labels, expected_sha256)
    whole = Skeleton.of(found, dtype, attn)
    if whole is None:
        return None
    anatomy = probe(whole.model)
    bound = f"in 0..{anatomy.num_layers - 1} ({anatomy.num_layers} blocks, the last stays above)"
    check(isinstance(k, int) and 0 <= k < anatomy.num_layers, "k", k, bound)
    lower, upper = whole, Skeleton(found, dtype, attn, whole.files)
    digest = whole.digest()
    lower.fill(lambda p: p.of_base and (p.block is None or p.block < k))
    upper.fill(lambda p: not p.embedding if p.block is None else p.block >= k)
    for one in (lower, upper):
        give_pad_token(one.model, found.tokenizer, str(name_or_path))
        if dropout is not None:
            set_dropout(one.model, dropout)
    try:
        base = lower.model.base_model
        assert isinstance(base, PreTrainedModel), "transformers' own invariant"
        bottom, top = make_bottom(base, k), make_top(upper.model, k)
        bottom.task = top.task
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(whole.model).__name__}: its forward does not run when cut at k={k}: {error}"
        ) from error
    lower.join(upper)  # the whole, of the halves' own tensors
    check_equivalence(lower.model, bottom, top)
    return ReadHalves(bottom.eval(), top.eval(), found.tokenizer, digest)


@dataclass(frozen=True)
class Place:
    """Where a parameter is: in which block (None: in none), in the base, as the embedding."""

    block: int | None
    of_base: bool
    embedding: bool


class Skeleton:
    """A model without weights, and where each of them is to be read."""

    def __init__(
        self, found: Described, dtype: torch.dtype, attn: str | None, files: TensorFiles
    ) -> None:
        from accelerate import init_empty_weights

        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = found.auto.from_config(
                found.config, dtype=dtype, attn_implementation=attn, trust_remote_code=False
            )
        model.tie_weights()
        self.model: PreTrainedModel = model
        nn.Module.eval(model)
        self._dtype, self.files = dtype, files
        self._real: set[str] = set()

    @classmethod
    def of(cls, found: Described, dtype: torch.dtype, attn: str | None) -> Skeleton | None:
        """Return the skeleton of a plain checkpoint's model, or None for any other.

        Raises:
            ModelError: a file is missing or damaged.
        """
        folder = Path(found.where)
        if not folder.is_dir() or hasattr(found.config, "quantization_config"):
            return None
        made = cls(found, dtype, attn, TensorFiles(weight_files(folder)))
        return made if made.plain() else None

    def plain(self) -> bool:
        """Whether every weight is in the files, under its own name and in its own shape."""
        narrow = self._dtype != torch.float32
        for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
            if narrow and getattr(self.model, name, None):
                return False
        own = {**dict(self.model.named_parameters()), **self._buffers()}
        shapes = self.files.shapes
        return all(shapes.get(name) == tuple(tensor.shape) for name, tensor in own.items())

    def _buffers(self) -> dict[str, Tensor]:
        saved = self.model.state_dict()
        return {name: b for name, b in self.model.named_buffers() if name in saved}

    def _read(self, name: str) -> Tensor:
        tensor = self.files.get(name)
        same = not tensor.is_floating_point() or tensor.dtype == self._dtype
        return tensor if same else tensor.to(self._dtype)

    def digest(self) -> str:
        """Return the digest of the base's weights, one of them in memory at a time."""
        base = self.model.base_model
        names = {id(module): name for name, module in self.model.named_modules()}
        prefix = f"{names[id(base)]}." if names[id(base)] else ""
        aliases = self._aliases()
        sha = hashlib.sha256()
        for name in sorted(base.state_dict()):
            tensor = self._read(aliases.get(prefix + name, prefix + name))
            flat: Any = tensor.contiguous().reshape(-1)
            sha.update(f"{name}\0{flat.dtype}\0{tuple(tensor.shape)}\0".encode())
            sha.update(memoryview(flat.view(torch.uint8).numpy()))
        return sha.hexdigest()

    def _aliases(self) -> dict[str, str]:
        """Return the name that a tied parameter is read by, for each of its other names."""
        first: dict[int, str] = {}
        found: dict[str, str] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if id(parameter) in first:
                found[name] = first[id(parameter)]
            first.setdefault(id(parameter), name)
        return found

    def fill(self, wanted: Callable[[Place], bool]) -> None:
        """Read the weights at wanted places; the others become zeros without memory.

        A tied parameter is wanted if it is at any of its places.
        """
        aliases, places = self._aliases(), self._places()
        held = {aliases.get(name, name) for name, place in places.items() if wanted(place)}
        new: dict[str, nn.Parameter] = {}
        for name, parameter in list(self.model.named_parameters(remove_duplicate=False)):
            first = aliases.get(name, name)
            if first not in new:
                if first in held:
                    value = self._read(first)
                else:
                    value = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                new[first] = nn.Parameter(value, value.is_floating_point())
            self._put(name, new[first])
        for name in self._buffers():
            module, _, leaf = name.rpartition(".")
            self.model.get_submodule(module)._buffers[leaf] = self._read(name)
        self._real = held

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Give a block its weights, read from the files, for as long as the context lasts."""
        block = probe(self.model).blocks[index]
        path = f"{probe(self.model).blocks_path}.{index}."
        aliases, empty = self._aliases(), dict(block.named_parameters(remove_duplicate=False))
        new: dict[str, nn.Parameter] = {}
        for name in empty:
            first = aliases.get(path + name, path + name)
            if first not in new:
                value = self._read(first)
                new[first] = nn.Parameter(value, value.is_floating_point())
            self._put(path + name, new[first])
        del new
        try:
            yield block
        finally:
            for name, parameter in empty.items():
                self._put(path + name, parameter)

    def join(self, other: Skeleton) -> None:
        """Take the other's weights where this one has none."""
        aliases, theirs = self._aliases(), dict(other.model.named_parameters())
        for name, _ in list(self.model.named_parameters(remove_duplicate=False)):
            first = aliases.get(name, name)
            if first not in self._real:
                self._put(name, theirs[first])

    def _put(self, name: str, parameter: nn.Parameter) -> None:
        module, _, leaf = name.rpartition(".")
        self.model.get_submodule(module)._parameters[leaf] = parameter

    def _places(self) -> dict[str, Place]:
        anatomy = probe(self.model)
        base = self.model.base_model
        names = {id(module): name for name, module in self.model.named_modules()}
        inside = f"{names[id(base)]}." if names[id(base)] else ""
        embedding = names[id(anatomy.input_embeddings)] + "."
        blocks = anatomy.blocks_path + "."
        found = {}
        for name, _ in self.model.named_parameters(remove_duplicate=False):
            block = None
            if name.startswith(blocks):
                block = int(name.removeprefix(blocks).partition(".")[0])
            found[name] = Place(block, name.startswith(inside), name.startswith(embedding))
        return found
