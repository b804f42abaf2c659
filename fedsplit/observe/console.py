"""The console of the commands: text is text, and what is printed cannot end what is being done.

A run of hours prints its table last.  A terminal that has no such character, a pipe that its reader
closed, a full disk behind ``> file`` or a path that reads like markup must not turn it into a
failed one.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

from rich.console import Console
from rich.text import Text

from fedsplit.errors import FedsplitError
from fedsplit.observe.printable import printable

MOST_OF_AN_ERROR = 1 << 16


class _Output(io.TextIOBase):
    """Standard output as it is at each call; what cannot be written is dropped.

    Attributes:
        lost: the first error of writing; None while everything arrived.
    """

    def __init__(self) -> None:
        self.lost: Exception | None = None

    @property
    def _stream(self) -> IO[str] | None:
        # While a progress bar is shown, sys.stdout prints by way of the console.
        return getattr(sys.stdout, "rich_proxied_file", sys.stdout)

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding of the terminal or pipe."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        """Return whether it is a terminal."""
        stream = self._stream
        return stream is not None and not stream.closed and stream.isatty()

    def fileno(self) -> int:
        """Return the stream's descriptor.

        Raises:
            OSError: it has none.
        """
        if self._stream is None:
            raise io.UnsupportedOperation("fileno")
        return self._stream.fileno()

    def write(self, text: str) -> int:
        """Write ``text``; a character that the encoding lacks becomes its Python escape."""
        with self._losing() as stream:
            try:
                stream.write(text)
            except UnicodeEncodeError:
                encoding = self.encoding
                stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        """Hand everything on."""
        with self._losing() as stream:
            stream.flush()

    @contextmanager
    def _losing(self) -> Iterator[IO[str]]:
        stream = self._stream
        if stream is None or self.lost is not None:
            stream = io.StringIO()
        try:
            yield stream
        except (OSError, ValueError) as error:  # ValueError: it is closed
            self.lost = error


class PlainConsole(Console):
    """Console that shows every text as it is: no markup, no emoji codes, no error of writing.

    Styles come as :class:`rich.text.Text` or by ``style``.

    Args:
        file: where to print; None = standard output, as it is at each print.
        settings: see :class:`rich.console.Console`.
    """

    def __init__(self, file: IO[str] | None = None, **settings: Any) -> None:
        self._output = _Output()
        out: Any = self._output if file is None else file
        super().__init__(file=out, markup=False, emoji=False, **settings)

    @property
    def lost(self) -> Exception | None:
        """Why something printed did not reach standard output; None if everything did."""
        return self._output.lost

    def error(self, error: Exception) -> None:
        """Print an error made on purpose, in one paragraph that is not wrapped."""
        told = printable(error, keep="\n", most=MOST_OF_AN_ERROR)
        text = Text.assemble((type(error).__name__, "red"), f": {told}")
        self.print(text, highlight=False, soft_wrap=True)


console = PlainConsole()


def run_command_line(app: Callable[[], object]) -> None:
    """Run a command line to its end and exit.

    An error made on purpose is one line and exit code 1; so is output that was lost, which is told
    on standard error.  A reader that closed the pipe has seen what it wanted.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what prints past the console
            stream.reconfigure(errors="backslashreplace")
    code: str | int | None = 0
    try:
        app()
    except FedsplitError as error:
        console.error(error)
        code = 1
    except SystemExit as end:
        code = end.code
    if console.lost is not None:
        # The interpreter flushes standard output once more as it ends.
        with suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(console.lost, BrokenPipeError):
            with suppress(OSError, ValueError, AttributeError):
                sys.stderr.write(f"standard output: lost what was printed: {console.lost}\n")
            code = code or 1
    raise SystemExit(code)
