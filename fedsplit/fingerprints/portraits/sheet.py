"""A sheet of portraits: bases in the first row, their descendants under them.

What HuRef's figures show (arXiv 2312.04828, figures 1 and 5): a person sorts descendants under
their base by looking.  The first row stands on a band of its own; labels say what was done, no
number is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedsplit.errors import LineageError, check
from fedsplit.fingerprints.portraits.canvas import encode_png
from fedsplit.fingerprints.portraits.lettering import CELL, HEIGHT, wrap, write_text

Painter = Callable[[ArrayLike, int], NDArray[np.uint8]]
"""(512-vector, side) -> (side, side, 3) picture."""

Column = tuple[str, Sequence[tuple[str, ArrayLike]]]
GAP = 10
BAND = (226, 232, 240)
LINES = 2


def paint_dog(vector: ArrayLike, size: int) -> NDArray[np.uint8]:
    """The built-in generator's picture."""
    from fedsplit.fingerprints.portraits.portrait import draw

    return draw(vector).pixels(size)


def fit(picture: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """A picture of any shape in a (size, size, 3) square, nearest pixels, white around it."""
    height, width, _ = picture.shape
    scale = size / max(height, width)
    rows = np.minimum((np.arange(max(1, int(height * scale))) / scale).astype(int), height - 1)
    columns = np.minimum((np.arange(max(1, int(width * scale))) / scale).astype(int), width - 1)
    small = picture[rows][:, columns]
    page = np.full((size, size, 3), 255, np.uint8)
    top, left = (size - small.shape[0]) // 2, (size - small.shape[1]) // 2
    page[top : top + small.shape[0], left : left + small.shape[1]] = small
    return page


def sheet_pixels(
    columns: Sequence[Column], *, size: int = 192, painter: Painter | None = None
) -> NDArray[np.uint8]:
    """The sheet as an (h, w, 3) picture.

    Args:
        columns: one per base: (title, [(label, vector of 512), ...]), the base's own vector first.
        size: side of one portrait in pixels.
        painter: draws one portrait; None for the built-in dogs.

    Raises:
        LineageError: for an empty sheet, an empty column, or a vector that is not 512 finite
            numbers.
        ConfigError: for a size out of range.
    """
    check(24 <= size <= 1024, "size", size, "in [24, 1024] (pixels)")
    if not columns or any(not entries for _, entries in columns):
        raise LineageError("sheet: every column needs at least its base's portrait")
    paint = painter or paint_dog
    scale = max(1, round(size / 110))
    line = scale * HEIGHT
    letters = size // (scale * CELL)
    titles = [wrap(name, letters, LINES) for name, _ in columns]
    title, label = max(map(len, titles)) * line + 4, LINES * line + 6
    down = max(len(entries) for _, entries in columns)
    pitch_x, pitch_y = size + GAP, size + label + GAP
    height = title + GAP + down * pitch_y + GAP
    page = np.full((height, len(columns) * pitch_x + GAP, 3), 255, np.uint8)
    page[: title + GAP + pitch_y] = BAND
    for i, (_, entries) in enumerate(columns):
        left = GAP + i * pitch_x
        for n, words in enumerate(titles[i]):
            write_text(page, words, left, GAP // 2 + 2 + n * line, scale=scale)
        for j, (what, vector) in enumerate(entries):
            top = title + GAP + j * pitch_y
            page[top : top + size, left : left + size] = fit(paint(vector, size), size)
            for n, words in enumerate(wrap(what, letters, LINES)):
                write_text(page, words, left, top + size + 4 + n * line, scale=scale, grey=70)
    return page


def draw_sheet(
    columns: Sequence[Column],
    path: str | Path,
    *,
    size: int = 192,
    painter: Painter | None = None,
) -> None:
    """Write :func:`sheet_pixels` as a PNG file.

    Raises:
        LineageError, ConfigError: see :func:`sheet_pixels`; LineageError if it cannot be written.
    """
    data = encode_png(sheet_pixels(columns, size=size, painter=painter))
    try:
        Path(path).write_bytes(data)
    except OSError as error:
        raise LineageError(f"{path}: cannot be written: {error}") from error
