"""Which files of a folder are which split: by their names, never by a silent guess."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from fedsplit.errors import DataError

SPLITS = ("train", "dev", "valid", "validation", "val", "eval", "test")
_ALIASES = {
    "training": "train",
    "development": "dev",
    "evaluation": "eval",
    "testing": "test",
    **{split: split for split in SPLITS},
}
_WORDS = "|".join(sorted(_ALIASES, key=len, reverse=True))
_WHOLE = re.compile(rf"({_WORDS})(-\d+-of-\d+)?", re.IGNORECASE)
_PART = re.compile(rf"(?:^|(?<=[^a-z]))({_WORDS})(?![a-z])", re.IGNORECASE)


def canonical(split: str) -> str:
    """Return a split's one name: ``Testing`` is ``test``; a name that is none stays as it is."""
    return _ALIASES.get(split.casefold(), split)


def data_files(path: Path, suffixes: Collection[str]) -> dict[str, list[Path]]:
    """Return the data files of each split at a path.

    One file is the split ``train`` whatever its name.  In a folder, files named after splits are
    these splits, in any case and also in parts (``Train.csv``, ``testing.jsonl``,
    ``test-00000-of-00002.parquet``); files beside them are left out.  Where no name is a split's,
    one word of it may be (``reviews_test.csv``), of every file or of none.  A folder without such
    names is the split ``train`` of all its data files.

    Args:
        path: a file or folder.
        suffixes: of data files, lower case.

    Raises:
        DataError: there is nothing to read, or which split a file is cannot be told.
    """
    if path.is_file():
        if path.suffix.lower() not in suffixes:
            raise DataError(f"{path}: suffix={path.suffix!r}: must be one of {', '.join(suffixes)}")
        return {"train": [path]}
    if not path.is_dir():
        raise DataError(f"path={str(path)!r}: must be a file or a folder that is there")
    data = sorted(f for f in path.iterdir() if f.suffix.lower() in suffixes and f.is_file())
    if not data:
        names = ", ".join(sorted(file.name for file in path.iterdir())[:20]) or "nothing"
        raise DataError(f"{path}: must hold files with {', '.join(suffixes)}; found: {names}")
    found = _by_name(path, data) or _by_word(path, data)
    return {split: found[split] for split in SPLITS if split in found} or {"train": data}


def is_unsplit(path: Path, suffixes: Collection[str]) -> bool:
    """Whether ``path`` is a folder whose files' names tell no split."""
    if not path.is_dir():
        return False
    data = [f for f in path.iterdir() if f.suffix.lower() in suffixes and f.is_file()]
    return not (_by_name(path, data) or _by_word(path, data))


def _by_name(path: Path, data: list[Path]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    whole: dict[str, Path] = {}
    for file in data:
        match = _WHOLE.fullmatch(file.stem)
        if match is None:
            continue
        split = canonical(match[1])
        if not match[2]:
            _check_single(path, split, file, whole.setdefault(split, file))
        found.setdefault(split, []).append(file)
    for split, files in found.items():
        _check_one_format(path, split, files)
        if split in whole:
            others = [file for file in files if file != whole[split]]
            _check_single(path, split, [*others, whole[split]][0], whole[split])
    return found


def _by_word(path: Path, data: list[Path]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    without: list[Path] = []
    for file in data:
        words = {canonical(word) for word in _PART.findall(file.stem)}
        if len(words) == 1:
            found.setdefault(words.pop(), []).append(file)
        else:
            without.append(file)
    if set(found) <= {"train"}:  # nothing here could leak into training
        return {}
    if without:
        raise DataError(
            f"{path}: {', '.join(f.name for f in without[:5])} beside "
            f"{', '.join(f.name for files in found.values() for f in files[:2])}: which of them "
            "are for training cannot be told; name two files or folders (data.path and "
            "data.test-path; node config data-path and test-path)"
        )
    for split, files in found.items():
        _check_one_format(path, split, files)
    return found


def _check_single(path: Path, split: str, file: Path, other: Path) -> None:
    if file != other:
        raise DataError(f"{path}: {other.name} and {file.name}: must be one file for {split!r}")


def _check_one_format(path: Path, split: str, files: list[Path]) -> None:
    if len({file.suffix for file in files}) > 1:
        names = ", ".join(file.name for file in files)
        raise DataError(f"{path}: split {split!r} in several formats: {names}")
