"""Drawing pictures with matplotlib, which comes with the extra ``plot``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from fedsplit.errors import RunError


@contextmanager
def picture(
    path: Path,
    rows: int = 1,
    columns: int = 1,
    *,
    dpi: int = 130,
    bottom: float = 0.0,
    **subplots: Any,
) -> Iterator[tuple[Any, Any]]:
    """Yield (figure, axes) as ``pyplot.subplots`` makes them; the block's end writes the PNG file.

    ``bottom`` is the share of the height left free below the axes.

    Raises:
        RunError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise RunError(f"matplotlib: {error}: pip install 'fedsplit[plot]'") from None
    mpl.use("Agg")
    mpl.rcParams["text.parse_math"] = False  # "$" in a name is a character
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, **subplots)
    try:
        yield figure, axes
        figure.tight_layout(rect=(0, bottom, 1, 1))
        figure.savefig(path, dpi=dpi)
    finally:
        pyplot.close(figure)


def plain_log(*axes: Any) -> None:
    """Label the ticks of logarithmic axes (``axes.xaxis``) in plain digits, as many as fit.

    matplotlib's own labels are formulas, which are not parsed here.
    """
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        """Leaves out what matplotlib would; writes 0.2, not 2e-01."""

        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    for axis in axes:
        axis.set_major_formatter(Plain(minor_thresholds=(1.5, 0.5)))
        axis.set_minor_formatter(Plain(minor_thresholds=(1.5, 0.5)))


def draw_if_possible(
    console: Console, path: Path, draw: Callable[..., object], *drawn: object
) -> None:
    """Draw a picture and name it; without matplotlib say so: the figures are in results.json."""
    try:
        draw(path, *drawn)
    except RunError as error:
        console.print(Text("no picture:", "yellow"), str(error), highlight=False)
    if path.exists():
        console.print(f"picture: {path}")
