"""Tensors in safetensors files, sharded or not, one in memory at a time.

A tensor is mapped when it is asked for and unmapped when it is let go.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedsplit.errors import ModelError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class TensorFiles:
    """Named tensors over one or several safetensors files.

    Args:
        files: the file that holds each name, or a list of files to read the names from.

    Raises:
        ModelError: for a missing or damaged file, or a name that its file lacks.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.where: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in files:
            with _opened(path) as handle:
                for name in handle.keys():  # noqa: SIM118 - not a dict
                    self.where[name] = path
                    self.shapes[name] = tuple(handle.get_slice(name).get_shape())

    def get(self, name: str) -> Tensor:
        """Return one tensor in its stored type; its pages are unmapped when it is freed."""
        with _opened(self.where[name]) as handle:
            try:
                tensor: Tensor = handle.get_tensor(name)
            except (SafetensorError, RuntimeError) as error:
                raise ModelError(f"{self.where[name]}: tensor {name!r}: {error}") from error
        return tensor

    def rows(self, name: str, index: Sequence[int]) -> Tensor:
        """Return some rows of a matrix, (len(index), d), without reading the others."""
        with _opened(self.where[name]) as handle:
            part = handle.get_slice(name)
            return torch.cat([part[i : i + 1] for i in index])


class _opened:
    """safe_open with errors that name the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Any:
        try:
            self.handle: Any = cast(Any, safe_open)(self.path, framework="pt", device="cpu")
            return self.handle.__enter__()
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{self.path}: not a readable safetensors file: {error}") from error

    def __exit__(self, *args: object) -> None:
        self.handle.__exit__(*args)


def weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files of a model directory.

    Raises:
        ModelError: if there are none, or the index names a file outside the directory.
    """
    index = directory / INDEX
    if not index.is_file():
        single = directory / SINGLE
        if not single.is_file():
            raise ModelError(f"{directory}: has neither {SINGLE} nor {INDEX}")
        return [single]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ModelError(f"{index}: not a weight index: {error!r}") from error
    for name in names:
        plain = isinstance(name, str) and Path(name).name == name and len(name) <= 200
        if not plain or "\0" in name:
            raise ModelError(f"{index}: shard {name!r} must be a plain file name")
        if not (directory / name).is_file():
            raise ModelError(f"{index}: shard {name!r} is missing")
    return [directory / name for name in names]
