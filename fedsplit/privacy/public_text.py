"""Text that everyone has: what priors, denoisers and label-free token choices are made from.

The interpreter ships about a megabyte of English: the help topics (``pydoc_data.topics``) and its
modules' docstrings.  Neither is anybody's secret and nothing is downloaded.  A corpus nearer to the
owners' domain is better: a server may name a file of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedsplit import storage
from fedsplit.errors import ConfigError

MAX_BYTES = 64 << 20


def public_texts(path: str = "", *, docstrings: bool = True) -> list[str]:
    """Return public texts.

    Args:
        path: UTF-8 files with one text per line, or folders whose ``*.txt`` are such files, several
            of them separated as in PATH; empty: what the interpreter ships.
        docstrings: whether the docstrings count as public; they do not where they are the owners'
            own data (``data.kind = "docstrings"``).

    Raises:
        ConfigError: if one cannot be read or has no text, or they are larger than 64 MB.
    """
    if path:
        return _of_files(path)
    from pydoc_data import topics

    texts = [topics.topics[name] for name in sorted(topics.topics)]
    pieces = [" ".join(piece.split()) for text in texts for piece in text.split("\n\n")]
    found = [piece for piece in pieces if piece]
    if docstrings:
        from fedsplit.data import Request
        from fedsplit.data.docstrings import read

        found += read(Request(label_column=""), "train").texts
    return found


def _of_files(paths: str) -> list[str]:
    found: list[str] = []
    left = MAX_BYTES
    for part in paths.split(os.pathsep):
        path = Path(part)
        files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        if not files:
            raise ConfigError(f"privacy.public-text={part!r}: must hold at least one .txt file")
        for file in files:
            lines, size = _lines(file, left)
            found += lines
            left -= size
    return found


def _lines(path: Path, most: int) -> tuple[list[str], int]:
    try:
        content = storage.read_bounded(path, most)
        lines = [line.strip() for line in content.decode("utf-8-sig").splitlines()]
    except storage.FileTooLarge:
        raise ConfigError(
            f"privacy.public-text={str(path)!r}: must be <= {MAX_BYTES} bytes with the others"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"privacy.public-text={str(path)!r}: must be a readable UTF-8 file: {error}"
        ) from None
    found = [line for line in lines if line]
    if not found:
        raise ConfigError(f"privacy.public-text={str(path)!r}: must hold at least one line of text")
    return found, len(content)


def public_ids(tokenizer: Any, texts: Iterable[str], max_tokens: int) -> list[list[int]]:
    """Return the texts' token ids, special tokens included, cut at ``max_tokens``."""
    rows: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=max_tokens)[
        "input_ids"
    ]
    return [row for row in rows if row]
