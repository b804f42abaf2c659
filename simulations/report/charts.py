"""Charts as inline SVG: curves, and points with intervals.  No script, no other file.

Colours are classes (``s0`` ... ``s9``) that the page's style sheet sets for light and dark screens.
A chart is drawn 440 units wide, and scales down to a phone with its text still readable; its legend
is text of the page.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 38
COLOURS = 10


@dataclass(frozen=True)
class Point:
    """One point; ``low`` and ``high`` are the ends of an interval along x."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    label: str = ""


@dataclass(frozen=True)
class Series:
    """What has one colour; ``joined`` points are a curve, a ``faint`` one is in the background."""

    name: str
    points: Sequence[Point]
    joined: bool = True
    faint: bool = False


def chart(
    series: Sequence[Series],
    *,
    title: str,
    x: str,
    y: str = "",
    whole_x: bool = False,
    levels: Sequence[tuple[str, float]] = (),
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
) -> Markup:
    """Return a chart with its legend.

    Args:
        series: what is drawn.
        title: what it shows, also for those who cannot see it.
        x: what the horizontal axis is.
        y: what the vertical axis is, if the title does not say so.
        whole_x: whether x has whole numbers alone.
        levels: (name, height) of dashed lines across.
        x_range: ends of the horizontal axis; None: those of the points.
        y_range: likewise.
    """
    points = [point for row in series for point in row.points]
    if not points:
        return Markup("")
    ends = [v for p in points for v in (p.x, p.low, p.high) if v is not None]
    across = _Axis.over(ends, x_range, LEFT, WIDTH - RIGHT, 1.0 if whole_x else 0.0)
    heights = [p.y for p in points] + [height for _, height in levels]
    up = _Axis.over(heights, y_range, HEIGHT - BOTTOM, TOP)
    parts = list(_grid(across, up, x, y))
    for index, (_, height) in enumerate(levels):
        at = up.place(height)
        parts.append(line(LEFT, at, WIDTH - RIGHT, at, f"level s{(len(series) + index) % 10}"))
    for index, row in reversed(list(enumerate(series))):  # the first is drawn on top
        parts += _drawn(row, index, across, up)
    names = [row.name for row in series] + [name for name, _ in levels]
    return framed(title, "".join(parts), names, len(series))


@dataclass(frozen=True)
class _Axis:
    ticks: Sequence[float]
    start: float
    end: float
    first: float
    last: float

    @classmethod
    def over(
        cls,
        values: Iterable[float],
        ends: tuple[float, float] | None,
        first: float,
        last: float,
        least: float = 0.0,
    ) -> _Axis:
        known = list(values)
        low, high = ends or (min(known), max(known))
        if high - low < 1e-9:
            room = abs(low) * 0.05 or 0.5
            low, high = low - room, high + room
        step = max(least, _step(high - low))
        start, end = step * math.floor(low / step + 1e-9), step * math.ceil(high / step - 1e-9)
        count = round((end - start) / step)
        return cls([start + step * n for n in range(count + 1)], start, end, first, last)

    def place(self, value: float) -> float:
        share = (value - self.start) / (self.end - self.start)
        return self.first + min(1.0, max(0.0, share)) * (self.last - self.first)


def _step(span: float) -> float:
    """Return 1, 2 or 5 times a power of ten, of which three to seven make ``span``."""
    power = 10.0 ** math.floor(math.log10(span / 3))
    return next(power * m for m in (1, 2, 5, 10) if span / (power * m) <= 7)


def _grid(across: _Axis, up: _Axis, x: str, y: str) -> Iterable[str]:
    for value in up.ticks:
        at = up.place(value)
        yield line(LEFT, at, WIDTH - RIGHT, at, "grid")
        yield text(LEFT - 6, at + 4, f"{value:.4g}", "end")
    for value in across.ticks:
        yield text(across.place(value), HEIGHT - BOTTOM + 16, f"{value:.4g}", "middle")
    yield text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5, x, "middle")
    yield (
        f'<text class="middle" transform="translate(11 {(HEIGHT - BOTTOM + TOP) / 2:.0f}) '
        f'rotate(-90)">{escape(y)}</text>'
    )


def _drawn(row: Series, index: int, across: _Axis, up: _Axis) -> Iterable[str]:
    colour = f"s{index % COLOURS}" + (" faint" if row.faint else "")
    placed = [(across.place(p.x), up.place(p.y), p) for p in row.points]
    if row.joined and len(placed) > 1:
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b, _ in placed)
        yield f'<polyline class="curve {colour}" points="{path}"/>'
    for a, b, point in placed:
        if point.low is not None and point.high is not None:
            yield line(across.place(point.low), b, across.place(point.high), b, f"bar {colour}")
        what = f"{row.name}{', ' if point.label else ''}{point.label}: {point.x:.4g}, {point.y:.4g}"
        size = 2.5 if row.faint else 4
        yield (
            f'<circle class="{colour}" cx="{a:.1f}" cy="{b:.1f}" r="{size}">'
            f"<title>{escape(what)}</title></circle>"
        )
        if point.label:
            yield text(a + 6, b - 6, point.label, "small")


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """Return a line of a class."""
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def text(x: float, y: float, words: str, kind: str) -> str:
    """Return words at a place, escaped."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(words)}</text>'


def framed(
    title: str, inside: str, names: Sequence[str], solid: int, height: int = HEIGHT
) -> Markup:
    """Return a drawing with its legend.

    Args:
        title: what it shows.
        inside: elements whose texts are escaped.
        names: of the legend.
        solid: how many of them are not dashed lines.
        height: of the drawing.
    """
    legend = "".join(
        f'<li><i class="s{index % COLOURS}{"" if index < solid else " dashed"}"></i>'
        f"{escape(name)}</li>"
        for index, name in enumerate(names)
    )
    return Markup(  # every text in it was escaped where it was put in
        f'<figure><svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'
        f'{inside}</svg><ul class="legend">{legend}</ul></figure>'
    )
