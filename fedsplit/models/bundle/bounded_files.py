"""Files from another party: their names, sizes and kinds, before anything of them is read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from fedsplit.errors import ModelError


def check_size(name: str, size: int, limits: Mapping[str, int]) -> None:
    """Check that a file is one of those with a limit, and within it.

    Raises:
        ModelError: names the file and the bound.
    """
    if name not in limits:
        raise ModelError(f"{name!r}: must be one of the files {', '.join(sorted(limits))}")
    if size > limits[name]:
        raise ModelError(f"{name}: {size} bytes: must be <= {limits[name]}")


def check_folder(folder: Path, limits: Mapping[str, int], required: Collection[str]) -> list[Path]:
    """Return the files of a folder in order of name.

    Raises:
        ModelError: if it holds anything but plain files of the listed names and sizes, or lacks a
            required one.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder}: must be a folder")
    paths = sorted(folder.iterdir())
    for path in paths:
        if path.is_symlink() or not path.is_file():
            raise ModelError(f"{path}: must be a plain file")
        check_size(path.name, path.stat().st_size, limits)
    missing = sorted(set(required) - {path.name for path in paths})
    if missing:
        raise ModelError(f"{folder}: must hold {', '.join(missing)}")
    return paths
