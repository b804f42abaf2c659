"""Text from another party as it may stand in a log line or on a terminal."""

from __future__ import annotations

import copy
import logging

MOST_CHARACTERS = 2000


def printable(text: object, keep: str = "", most: int = MOST_CHARACTERS) -> str:
    r"""Return ``text`` without characters that move a cursor, end a line or reorder what is shown.

    Whatever Unicode does not call printable (controls, escapes, line and paragraph separators,
    direction overrides, surrogates) becomes its Python escape, such as ``\x1b``.

    Args:
        text: from another party.
        keep: characters that stay as they are, such as a line break in a text of several lines.
        most: longer texts are cut.

    Examples:
        >>> printable("a\x1b[2Jb\nc")
        'a\\x1b[2Jb\\nc'
    """
    shown = str(text)
    cut = shown[:most]
    if not cut.isprintable():
        cut = "".join(c if c.isprintable() or c in keep else _escaped(c) for c in cut)
    return cut if len(shown) <= most else cut + "..."


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


class PrintableHandler(logging.Handler):
    """Handler that hands records on with what they carry of others' texts escaped.

    A line break inside a message is kept, and indents what follows: no text of another party looks
    like a log line of its own.

    Args:
        inner: writes the records; it is not closed with this one.
    """

    def __init__(self, inner: logging.Handler) -> None:
        super().__init__()
        self.inner = inner

    def emit(self, record: logging.LogRecord) -> None:
        """Hand on a copy: for other handlers the record stays as it is."""
        shown = copy.copy(record)
        shown.msg, shown.args = _indented(record.getMessage()), ()
        if record.exc_info:
            trace = logging.Formatter().formatException(record.exc_info)
            shown.exc_text = "    " + _indented(trace)
        self.inner.handle(shown)


def _indented(text: str) -> str:
    return printable(text, keep="\n\t", most=1 << 16).replace("\n", "\n    ")
