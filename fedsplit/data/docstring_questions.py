"""Prompts and answers without a download: what the standard library says its own names do.

The prompt asks for a public function, class or method by name, the answer is the first sentence of
its docstring; both are read from the interpreter's own source files, as :mod:`~.docstrings` does.
"""

from __future__ import annotations

import ast
import re
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from fedsplit.data.areas import AREAS
from fedsplit.data.conversations import ASSISTANT, to_text
from fedsplit.data.docstrings import SCOPES, no_garbage, sources
from fedsplit.data.table import Request, Source, Table
from fedsplit.errors import DataError

MIN_WORDS = 4
MAX_WORDS = 32
_SENTENCE = re.compile(r"(.*?[.!?])(?=\s|$)")
_PROSE = re.compile(r"^[A-Z][a-z]+ .*[a-z]{2}.*[.!]$")


def question(name: str) -> str:
    """Return the prompt about a name such as ``heapq.heappush``."""
    return f"What does Python's {name} do?"


def splits(request: Request) -> tuple[str, ...]:
    """Return the one split there is."""
    return ("train",)


def read(request: Request, split: str) -> Table:
    """Read one conversation for each public name whose docstring begins with a sentence.

    A sentence has 4 to 32 words and begins with a capital letter; an answer that was seen before is
    dropped.  The order is fixed: module, file, position in the file.  The same interpreter build
    gives the same texts, another version of Python gives others.

    Column, always present: ``group`` (the top-level module).

    Args:
        request: ``path`` and ``label_column`` must be empty.
        split: must be ``"train"``.

    Raises:
        DataError: if the interpreter comes without its source files, or a path, labels or a column
            that is not there are asked for.
    """
    for name in ("path", "label_column"):
        if value := getattr(request, name):
            raise DataError(f"{name}={value!r}: must be empty for docstring-questions")
    for column in request.columns:
        if column != "group":
            raise DataError(f"column={column!r}: is missing; found: group")
    texts, groups, names = _collect(sysconfig.get_path("stdlib"))
    return Table(texts, (), {"group": groups}, "docstring-questions", chat=True, places=names)


def first_sentence(docstring: str) -> str:
    """Return the first sentence of a docstring's first paragraph as one line; empty if none fits.

    What begins with a signature, a fragment or a lower-case word is no sentence.
    """
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    found = _SENTENCE.match(paragraph)
    sentence = found.group(1) if found else ""
    long = MIN_WORDS <= len(sentence.split()) <= MAX_WORDS
    return sentence if long and _PROSE.match(sentence) else ""


@lru_cache(maxsize=1)
def _collect(stdlib: str) -> tuple[tuple[str, ...], ...]:
    """Return conversations, their top-level modules and the names asked for."""
    root = Path(stdlib)
    rows: dict[str, tuple[str, str, str]] = {}
    with no_garbage():
        for module in sorted(name for names in AREAS.values() for name in names):
            for file in sources(root, module):
                inside = file.relative_to(root).with_suffix("").parts
                parts = inside[:-1] if inside[-1] == "__init__" else inside
                if any(part.startswith("_") for part in parts):
                    continue
                for name, docstring in _named(file):
                    sentence = first_sentence(docstring)
                    if sentence:
                        asked = ".".join((*parts, name))
                        text = to_text([("user", question(asked)), (ASSISTANT, sentence)])
                        rows.setdefault(sentence.casefold(), (text, module, asked))
    if not rows:
        raise DataError(f"no docstrings below {stdlib}: this Python comes without its source files")
    texts, groups, names = zip(*rows.values(), strict=True)
    return texts, groups, names


def _named(file: Path) -> Iterator[tuple[str, str]]:
    """Yield (dotted name within the module, docstring) of public functions, classes, methods."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # a distribution's templates and deliberately bad files
        return
    yield from _below(tree.body, ())


def _below(body: list[ast.stmt], above: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for node in body:
        if not isinstance(node, SCOPES) or node.name.startswith("_"):
            continue
        name = (*above, node.name)
        if docstring := ast.get_docstring(node):
            yield ".".join(name), docstring
        if isinstance(node, ast.ClassDef):
            yield from _below(node.body, name)


SOURCE = Source(splits, read, public=True)
