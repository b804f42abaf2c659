"""Log lines as JSON, one object a line, each with the run, round and owner that it is about.

A line has ``time`` (UTC, ISO 8601), ``level``, ``logger``, ``event`` and ``message``; whatever is
bound (:mod:`fedsplit.observe.context`): ``run``, ``round``, ``mode``, ``node``, ``owner``; and, for
a note, figures under ``data``.  ``event`` is the text before its values were put in, or the note's
name: the same happening has always the same one.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedsplit.observe.context import context

MOST_TEXT = 4000  # characters of one message; tracebacks are cut to as many
MOST_BYTES = 64 << 20  # of one file; then it becomes FILE.1, and the FILE.1 before it goes

Keep = Callable[[logging.LogRecord], bool]


class JsonLines(logging.Handler):
    """Log handler that appends records to a file as JSON lines.

    A line is written with one ``write`` to a file opened O_APPEND, so lines of several processes
    never mix.  A full disk loses lines, counted in :attr:`dropped`, and nothing else: what is
    observed goes on.

    Args:
        path: the file; made with mode ``mode``.
        where: what every line has beside what is bound; bound values win.
        keep: which records are written; None = all.
        mode: file mode, for a file that is new.
        most_bytes: length from which the file is moved aside.
    """

    def __init__(
        self,
        path: Path,
        *,
        where: Callable[[], Mapping[str, Any]] = dict,
        keep: Keep | None = None,
        mode: int = 0o644,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        super().__init__()
        self.path = path
        self.dropped = 0
        self._where = where
        self._mode = mode
        self._most = most_bytes
        self._fd: int | None = None
        self._writing = threading.Lock()
        if keep is not None:
            self.addFilter(keep)

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record; whatever goes wrong costs this line alone."""
        try:
            self._write(_line(record, self._where()))
        except Exception:  # a log line must never be what ends a run
            self.dropped += 1

    def note(self, event: str, **data: Any) -> None:
        """Write a named event with figures, which no other log shows."""
        record = logging.LogRecord("fedsplit", logging.INFO, "", 0, event, None, None)
        record.event, record.data = event, data
        self.emit(record)

    def _write(self, data: bytes) -> None:
        with self._writing:
            if self._fd is None:
                flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
                self._fd = os.open(self.path, flags, self._mode)
            os.write(self._fd, data)
            if os.fstat(self._fd).st_size >= self._most:
                os.close(self._fd)
                self._fd = None
                self.path.replace(self.path.with_name(f"{self.path.name}.1"))

    def close(self) -> None:
        """Close the file."""
        with self._writing:
            if self._fd is not None:
                os.close(self._fd)
                self._fd = None
        super().close()


def _line(record: logging.LogRecord, where: Mapping[str, Any]) -> bytes:
    row: dict[str, Any] = {
        "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
        "level": record.levelname,
        "logger": record.name,
        "event": getattr(record, "event", None) or str(record.msg)[:200],
        "message": record.getMessage()[:MOST_TEXT],
        **where,
        **context(),
    }
    if data := getattr(record, "data", None):
        row["data"] = data
    if record.exc_info:
        row["traceback"] = logging.Formatter().formatException(record.exc_info)[-MOST_TEXT:]
    # ASCII: no text in a message, whoever wrote it, can end the line or confuse a terminal.
    return json.dumps(row, default=str).encode() + b"\n"


@contextmanager
def writing(handler: JsonLines, names: Iterable[str]) -> Iterator[JsonLines]:
    """Add ``handler`` to the loggers of those names, from INFO on, for the block."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        if logger.getEffectiveLevel() > logging.INFO:
            logger.setLevel(logging.INFO)
        logger.addHandler(handler)
    try:
        yield handler
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
        handler.close()
