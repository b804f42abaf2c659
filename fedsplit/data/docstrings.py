"""The default data set: the standard library's own English docstrings, labelled by topic.

Nothing is downloaded and nothing is redistributed: the texts are read from the source files of the
interpreter that runs this, with ``ast``, without importing any of them.
"""

from __future__ import annotations

import ast
import gc
import re
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from fedsplit.data.areas import AREAS
from fedsplit.data.table import Request, Source, Table
from fedsplit.errors import DataError

MIN_WORDS = 8  # plain words, identifiers and signatures not counted
MAX_WORDS = 64
_SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "__pycache__"})
SCOPES = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_HOLDERS = frozenset(  # the statements that hold others
    {
        *(*SCOPES, ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith),
        *(ast.Try, ast.TryStar),
    }
)
_WORD = re.compile(r"""(?<!\S)["'(`]*[A-Za-z][a-z']*[.,:;!?)"'`]*(?!\S)""")
_DOCTEST = re.compile(r"^[ \t]*>>>.*?(?:\n[ \t]*\n|\Z)", re.MULTILINE | re.DOTALL)
_PARAGRAPH = re.compile(r"\n[ \t]*\n")


def splits(request: Request) -> tuple[str, ...]:
    """Return the one split there is; hold out a part with ``train_test_split``."""
    return ("train",)


def read(request: Request, split: str) -> Table:
    """Read the docstrings of functions, classes, methods and modules.

    The order is fixed: module, file, position in the file; a text seen before is dropped.
    The same interpreter build gives the same texts, another version of Python gives others, so
    owners that compare data sets compare :attr:`~fedsplit.data.dataset.TextDataset.digest`.

    On CPython 3.11.7 with all its parts there are 5,667 texts of 8 to 64 words, majority share
    0.206: GUI and multimedia 1,168, testing and debugging 812, data types and maths 740, text and
    markup 725, packaging and import 606, networking 559, files and OS 533, concurrency 524; 4,605
    of functions, 783 of classes, 279 of modules, in 177 groups.  A linear probe on mean-pooled
    all-MiniLM-L6-v2 tells the areas apart with accuracy 0.77.  Distributions that ship tkinter and
    idlelib apart have fewer texts of the first area.

    Columns, always present: ``group`` (the top-level module, so owners split by it are unlike each
    other by nature), ``kind`` (``module``, ``class`` or ``function``).

    Args:
        request: ``path`` must be empty; ``label_column`` is ``"label"`` or empty (no labels).
        split: must be ``"train"``.

    Raises:
        DataError: if the interpreter comes without its source files, or a path or a column that
            is not there is asked for.
    """
    if request.path:
        raise DataError(f"path={request.path!r}: must be empty for the docstrings, which have none")
    if request.label_column not in ("", "label"):
        raise DataError(
            f"label_column={request.label_column!r}: must be 'label' or '' for the docstrings"
        )
    texts, areas, groups, kinds = _collect(sysconfig.get_path("stdlib"))
    columns = {"group": groups, "kind": kinds}
    for column in request.columns:
        if column not in columns:
            raise DataError(f"column={column!r}: is missing; found: {', '.join(columns)}")
    return Table(
        texts=texts,
        labels=areas if request.label_column else (),
        columns=columns,
        name="docstrings",
    )


def clean(docstring: str) -> str:
    """Return a docstring's prose as one line: no doctests, whole paragraphs up to ``MAX_WORDS``.

    The first paragraph is always kept, cut at ``MAX_WORDS`` words if it is longer; the following
    ones are added while the whole stays within the bound.
    """
    words: list[str] = []
    for paragraph in _PARAGRAPH.split(_DOCTEST.sub("\n\n", docstring)):
        more = paragraph.split()
        if words and len(words) + len(more) > MAX_WORDS:
            break
        words += more[:MAX_WORDS]
    return " ".join(words)


@contextmanager
def no_garbage() -> Iterator[None]:
    """Collect no garbage meanwhile: trees have no cycles, and looking for some doubles the time."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


@lru_cache(maxsize=1)
def _collect(stdlib: str) -> tuple[tuple[str, ...], ...]:
    """Return texts, areas, groups and kinds of all docstrings below the folder ``stdlib``."""
    root = Path(stdlib)
    area_of = {module: area for area, modules in AREAS.items() for module in modules}
    rows: dict[str, tuple[str, str, str, str]] = {}
    with no_garbage():
        for module in sorted(area_of):
            for file in sources(root, module):
                for kind, docstring in _docstrings(file):
                    text = clean(docstring)
                    if len(_WORD.findall(text)) >= MIN_WORDS:
                        rows.setdefault(text.casefold(), (text, area_of[module], module, kind))
    if not rows:
        raise DataError(f"no docstrings below {stdlib}: this Python comes without its source files")
    texts, areas, groups, kinds = zip(*rows.values(), strict=True)
    return texts, areas, groups, kinds


def sources(root: Path, module: str) -> list[Path]:
    """Return the module's source files in the order of their path, tests left out."""
    single = root / f"{module}.py"
    found = [single] if single.is_file() else []
    for file in sorted((root / module).rglob("*.py"), key=lambda file: file.as_posix()):
        if not _SKIPPED_FOLDERS.intersection(file.relative_to(root).parts):
            found.append(file)
    return found


def _docstrings(file: Path) -> Iterator[tuple[str, str]]:
    """Yield (kind, docstring) of a source file in the order of the source."""
    source = file.read_bytes()
    if b'"""' not in source and b"'''" not in source and b'r"' not in source:
        return
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # a distribution's templates and deliberately bad files
        return
    docstring = ast.get_docstring(tree, clean=False)  # its indents mean nothing to :func:`clean`
    if docstring:
        yield "module", docstring
    for node in scopes(tree.body):
        docstring = ast.get_docstring(node, clean=False)
        if docstring:
            yield "class" if isinstance(node, ast.ClassDef) else "function", docstring


def scopes(
    body: list[ast.stmt],
) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield classes and functions, nested ones after their holder; expressions are not walked."""
    for node in body:
        if type(node) not in _HOLDERS:
            continue
        if isinstance(node, SCOPES):
            yield node
        for field in ("body", "orelse", "finalbody"):
            yield from scopes(getattr(node, field, []))
        for handler in getattr(node, "handlers", []):
            yield from scopes(handler.body)


SOURCE = Source(splits, read, public=True)
