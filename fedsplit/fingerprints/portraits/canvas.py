"""Filled shapes, drawn by Pillow or written as SVG text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw

Points = NDArray[np.float64]
Colour = tuple[float, float, float]

SIDE = 200.0
"""Drawings live in a square from 0 to 200, y downwards."""

FINE = 8  # Pillow's polygons have hard edges: this many dots per pixel and axis are averaged


@dataclass(frozen=True)
class Shape:
    """Filled closed polygon, possibly clipped by another."""

    points: Points
    fill: Colour
    opacity: float = 1.0
    clip: Points | None = None


@dataclass
class Canvas:
    """Shapes in drawing order."""

    shapes: list[Shape] = field(default_factory=list)

    def add(
        self, points: Points, fill: Colour, opacity: float = 1.0, clip: Points | None = None
    ) -> None:
        """Draw a shape on top of what is there; an opacity of 0 draws nothing."""
        if opacity > 0.004:
            self.shapes.append(Shape(points, fill, min(1.0, opacity), clip))

    def svg(self, size: int = 512) -> str:
        """Return the drawing as an SVG document."""
        clips: list[str] = []
        body: list[str] = []
        for shape in self.shapes:
            clip = ""
            if shape.clip is not None:
                text = _path(shape.clip)
                if text not in clips:
                    clips.append(text)
                clip = f' clip-path="url(#c{clips.index(text)})"'
            alpha = "" if shape.opacity >= 0.999 else f' fill-opacity="{shape.opacity:.3f}"'
            body.append(f'<path d="{_path(shape.points)}" fill="{_hex(shape.fill)}"{alpha}{clip}/>')
        defs = "".join(
            f'<clipPath id="c{i}"><path d="{t}"/></clipPath>' for i, t in enumerate(clips)
        )
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{size}" height="{size}" '
            f'viewBox="0 0 {SIDE:g} {SIDE:g}"><defs>{defs}</defs>{"".join(body)}</svg>\n'
        )

    def image(self, size: int = 512) -> Image.Image:
        """Return the drawing as an RGB picture of (size, size) pixels."""
        page = Image.new("RGB", (size, size), "white")
        scale = size / SIDE
        for shape in self.shapes:
            left, top = np.floor(shape.points.min(0) * scale).astype(int).clip(0, size).tolist()
            ends = np.ceil(shape.points.max(0) * scale).astype(int) + 1
            right, bottom = ends.clip(0, size).tolist()
            if left >= right or top >= bottom:
                continue
            box = (left, top, right, bottom)
            mask = _mask(shape.points * scale, box)
            if shape.clip is not None:
                mask = ImageChops.multiply(mask, _mask(shape.clip * scale, box))
            mask = mask.point([round(v * shape.opacity) for v in range(256)])
            page.paste(_hex(shape.fill), box, mask)
        return page


def _hex(colour: Colour) -> str:
    return "#" + "".join(f"{round(255 * min(1.0, max(0.0, c))):02x}" for c in colour)


def _path(points: Points) -> str:
    return "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in points) + "Z"


def _mask(points: Points, box: tuple[int, int, int, int]) -> Image.Image:
    """Return how much of each pixel in ``box`` a polygon covers, 0 to 255."""
    left, top, right, bottom = box
    fine = Image.new("L", (FINE * (right - left), FINE * (bottom - top)))
    # Pillow fills the pixels whose numbers it is given, ends included: those in the middle.
    corners = np.rint((points - (left, top)) * FINE - 0.5)
    ImageDraw.Draw(fine).polygon([(x, y) for x, y in corners.tolist()], fill=255)
    return fine.reduce(FINE)


def smooth(points: Sequence[tuple[float, float]], steps: int = 10) -> Points:
    """Return a closed Catmull-Rom curve through the points."""
    p = np.asarray(points, float)
    before, after, beyond = np.roll(p, 1, 0), np.roll(p, -1, 0), np.roll(p, -2, 0)
    t = np.linspace(0, 1, steps, endpoint=False)[:, None, None]
    curve = 0.5 * (
        2 * p
        + (after - before) * t
        + (2 * before - 5 * p + 4 * after - beyond) * t**2
        + (3 * p - before - 3 * after + beyond) * t**3
    )
    joined: Points = curve.transpose(1, 0, 2).reshape(-1, 2)
    return joined


def mirrored(points: Points) -> Points:
    """Return the shape mirrored at the vertical middle."""
    out = points.copy()
    out[:, 0] = SIDE - out[:, 0]
    return out


def ellipse(x: float, y: float, rx: float, ry: float, turn: float = 0.0, n: int = 48) -> Points:
    """Return an ellipse with half axes ``rx`` and ``ry``, turned by ``turn`` radians."""
    a = np.linspace(0, 2 * np.pi, n, endpoint=False)
    u, v = rx * np.cos(a), ry * np.sin(a)
    c, s = np.cos(turn), np.sin(turn)
    return np.stack([x + c * u - s * v, y + s * u + c * v], 1)


def stroke(points: Sequence[tuple[float, float]], width: float, steps: int = 12) -> Points:
    """Return a tapered line along an open curve through the points, as a polygon."""
    p = np.asarray(points, float)
    padded = np.concatenate([2 * p[:1] - p[1:2], p, 2 * p[-1:] - p[-2:-1]])
    curve = smooth([(float(x), float(y)) for x, y in padded], steps)
    curve = curve[steps : steps * len(p) + 1]
    along = np.gradient(curve, axis=0)
    normal = np.stack([-along[:, 1], along[:, 0]], 1)
    normal /= np.linalg.norm(normal, axis=1, keepdims=True).clip(1e-9)
    taper = np.sin(np.linspace(0.25, np.pi - 0.25, len(curve)))[:, None]
    half = 0.5 * width * taper * normal
    return np.concatenate([curve + half, (curve - half)[::-1]])
