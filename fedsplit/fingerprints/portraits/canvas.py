"""Filled shapes drawn as SVG text or as PNG bytes, without any drawing library."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]
Colour = tuple[float, float, float]

SIDE = 200.0
"""Drawings live in a square from 0 to 200, y downwards."""


@dataclass(frozen=True)
class Shape:
    """A filled closed polygon, possibly clipped by another."""

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
        """The drawing as an SVG document."""
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

    def pixels(self, size: int = 512, oversample: int = 3) -> NDArray[np.uint8]:
        """The drawing as (size, size, 3) bytes."""
        image = np.ones((size, size, 3))
        for shape in self.shapes:
            cover = _coverage(shape.points, size, oversample)
            if cover is None:
                continue
            (top, left), mask = cover
            if shape.clip is not None:
                other = _coverage(shape.clip, size, oversample)
                if other is None:
                    continue
                full = np.zeros((size, size))
                (y, x), clipped = other
                full[y : y + clipped.shape[0], x : x + clipped.shape[1]] = clipped
                mask = mask * full[top : top + mask.shape[0], left : left + mask.shape[1]]
            alpha = mask[..., None] * shape.opacity
            area = image[top : top + mask.shape[0], left : left + mask.shape[1]]
            area += alpha * (np.array(shape.fill) - area)
        pixels: NDArray[np.uint8] = np.rint(image.clip(0, 1) * 255).astype(np.uint8)
        return pixels

    def png(self, size: int = 512) -> bytes:
        """The drawing as a PNG file's bytes."""
        return encode_png(self.pixels(size))


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """An (h, w, 3) image as PNG bytes."""
    height, width, _ = pixels.shape
    raw = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], 1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(raw.tobytes(), 9))
        + chunk(b"IEND", b"")
    )


def _hex(colour: Colour) -> str:
    return "#" + "".join(f"{round(255 * min(1.0, max(0.0, c))):02x}" for c in colour)


def _path(points: Points) -> str:
    return "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in points) + "Z"


def _coverage(
    points: Points, size: int, oversample: int
) -> tuple[tuple[int, int], NDArray[np.float64]] | None:
    """Even-odd coverage of a polygon in its bounding box: ((top, left), mask)."""
    scale = size / SIDE
    low = np.floor(points.min(0) * scale).astype(int).clip(0, size)
    high = (np.ceil(points.max(0) * scale).astype(int) + 1).clip(0, size)
    width, height = (int(v) for v in high - low)
    if width <= 0 or height <= 0:
        return None
    fine = (points * scale - low) * oversample
    rows, cols = height * oversample, width * oversample
    toggles = np.zeros((rows, cols + 1), np.int32)
    (x0, y0), (x1, y1) = fine.T, np.roll(fine, -1, 0).T
    first = np.ceil(np.minimum(y0, y1) - 0.5).astype(int).clip(0, rows)
    count = np.ceil(np.maximum(y0, y1) - 0.5).astype(int).clip(0, rows) - first
    edge = np.repeat(np.arange(len(fine)), count)  # each edge once per row that it crosses
    start = np.repeat(np.cumsum(count) - count, count)
    ys = first[edge] + np.arange(len(edge)) - start
    slope = (x1 - x0)[edge] / (y1 - y0)[edge]
    xs = x0[edge] + (ys + 0.5 - y0[edge]) * slope
    np.add.at(toggles, (ys, np.ceil(xs - 0.5).astype(int).clip(0, cols)), 1)
    inside = (np.cumsum(toggles[:, :-1], 1) % 2).astype(np.float64)
    mask = inside.reshape(height, oversample, width, oversample).mean((1, 3))
    return (int(low[1]), int(low[0])), mask


def smooth(points: Sequence[tuple[float, float]], steps: int = 10) -> Points:
    """A closed Catmull-Rom curve through the points."""
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
    """The same shape on the other side of the vertical middle."""
    out = points.copy()
    out[:, 0] = SIDE - out[:, 0]
    return out


def ellipse(x: float, y: float, rx: float, ry: float, turn: float = 0.0, n: int = 48) -> Points:
    """An ellipse, turned by ``turn`` radians."""
    a = np.linspace(0, 2 * np.pi, n, endpoint=False)
    u, v = rx * np.cos(a), ry * np.sin(a)
    c, s = np.cos(turn), np.sin(turn)
    return np.stack([x + c * u - s * v, y + s * u + c * v], 1)


def stroke(points: Sequence[tuple[float, float]], width: float, steps: int = 12) -> Points:
    """A tapered line along an open curve through the points, as a polygon."""
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
