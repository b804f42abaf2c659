"""A sheet of portraits: bases in the first row, their descendants under them.

What HuRef's figures show (arXiv 2312.04828, figures 1 and 5): a person sorts descendants under
their base by looking.  The first row stands on a band of its own; labels say what was done, no
number is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFont, ImageOps

from fedsplit.errors import LineageError, check

Painter = Callable[[ArrayLike, int], Image.Image]
"""(512-vector, side in pixels) -> RGB picture."""

Column = tuple[str, Sequence[tuple[str, ArrayLike]]]
GAP = 10
BAND = (226, 232, 240)
TITLE, LABEL = (40, 40, 40), (70, 70, 70)
LINES = 2


def paint_dog(vector: ArrayLike, size: int) -> Image.Image:
    """Return the built-in generator's picture."""
    from fedsplit.fingerprints.portraits.portrait import draw

    return draw(vector).image(size)


def wrap(text: str, fits: Callable[[str], bool], lines: int = LINES) -> list[str]:
    """Break a label at spaces, hyphens, underscores and slashes into at most ``lines`` lines.

    Args:
        text: the label; what does not fit is cut off, with an ellipsis, and what is not printable
            ASCII becomes a question mark, since Pillow's own font may lack it.
        fits: whether a line is short enough.
        lines: most lines.
    """
    found: list[str] = []
    rest = "".join(c if " " <= c <= "~" else "?" for c in text.strip())
    while rest and not fits(rest) and len(found) < lines - 1:
        end = next((n for n in range(len(rest), 1, -1) if fits(rest[:n].rstrip())), 1)
        cuts = [i + 1 for i, c in enumerate(rest[:end]) if c in " -_/"]
        cut = cuts[-1] if cuts else end
        found.append(rest[:cut].rstrip())
        rest = rest[cut:].lstrip()
    if rest and not fits(rest):
        end = next((n for n in range(len(rest), 1, -1) if fits(rest[:n].rstrip() + "...")), 1)
        rest = rest[:end].rstrip() + "..."
    return [*found, rest] if rest else found


def sheet_image(
    columns: Sequence[Column], *, size: int = 192, painter: Painter | None = None
) -> Image.Image:
    """Return the sheet as an RGB picture.

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
    font = ImageFont.load_default(size=max(9, size // 13))
    line = int(font.getbbox("Ag_")[3]) + 2  # pixels from one line to the next

    def fits(text: str) -> bool:
        return font.getlength(text) <= size

    titles = [wrap(name, fits) for name, _ in columns]
    title, label = max(map(len, titles)) * line + 4, LINES * line + 6
    down = max(len(entries) for _, entries in columns)
    pitch_x, pitch_y = size + GAP, size + label + GAP
    width, height = len(columns) * pitch_x + GAP, title + GAP + down * pitch_y + GAP
    page = Image.new("RGB", (width, height), "white")
    page.paste(BAND, (0, 0, width, title + GAP + pitch_y))
    pen = ImageDraw.Draw(page)
    for i, (_, entries) in enumerate(columns):
        left = GAP + i * pitch_x
        for n, words in enumerate(titles[i]):
            pen.text((left, GAP // 2 + 2 + n * line), words, TITLE, font)
        for j, (what, vector) in enumerate(entries):
            top = title + GAP + j * pitch_y
            page.paste(ImageOps.pad(paint(vector, size), (size, size), color="white"), (left, top))
            for n, words in enumerate(wrap(what, fits)):
                pen.text((left, top + size + 4 + n * line), words, LABEL, font)
    return page


def draw_sheet(
    columns: Sequence[Column],
    path: str | Path,
    *,
    size: int = 192,
    painter: Painter | None = None,
) -> None:
    """Write :func:`sheet_image` as a PNG file.

    Raises:
        LineageError, ConfigError: see :func:`sheet_image`; LineageError if it cannot be written.
    """
    page = sheet_image(columns, size=size, painter=painter)
    try:
        page.save(path, format="PNG", optimize=True)
    except OSError as error:
        raise LineageError(f"{path}: cannot be written: {error}") from error
