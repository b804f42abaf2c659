"""Map from a 512-vector to the traits and colours of a dog.

The vector goes through a fixed orthonormal projection onto a few dozen directions, each of which
steers one breed-like trait (coat, pattern, ears, muzzle, eyes, tongue, background).  Angles
give the colours, so that every hue is equally likely and none has an edge.

Guarantee: for z ~ N(0, I) traits are independent; every trait moves continuously with the vector.
Near 0, where an angle would jump, a colour fades to a neutral one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr

from fedsplit.errors import LineageError
from fedsplit.fingerprints.portraits.canvas import Colour
from fedsplit.seeding import numpy_generator

DIMENSION = 512
SEED = 20231206

COATS: tuple[Colour, ...] = (
    (0.96, 0.87, 0.70),  # cream
    (0.90, 0.66, 0.32),  # golden
    (0.72, 0.38, 0.17),  # red
    (0.42, 0.25, 0.15),  # chocolate
    (0.17, 0.16, 0.18),  # black
    (0.40, 0.44, 0.50),  # slate
    (0.68, 0.68, 0.69),  # silver
    (0.97, 0.96, 0.93),  # white
)
EYES: tuple[Colour, ...] = (
    (0.24, 0.13, 0.07),
    (0.45, 0.26, 0.10),
    (0.72, 0.47, 0.13),
    (0.45, 0.52, 0.25),
    (0.35, 0.58, 0.78),
)
TRAITS: tuple[str, ...] = (
    "coat_x",
    "coat_y",
    "mark_x",
    "mark_y",
    "ground_x",
    "ground_y",
    "collar_x",
    "collar_y",
    "ear_droop",
    "ear_length",
    "ear_width",
    "ear_set",
    "ear_dark",
    "face_width",
    "cheek",
    "jaw",
    "brow",
    "muzzle_width",
    "muzzle_length",
    "muzzle_light",
    "nose_size",
    "nose_tone",
    "eye_size",
    "eye_gap",
    "eye_colour",
    "eye_lid",
    "tongue",
    "blaze",
    "mask",
    "left_patch",
    "right_patch",
    "spots",
    "brows",
    "chest",
    "fluff",
    "halo",
    "dots",
)


@lru_cache(maxsize=1)
def projection() -> NDArray[np.float64]:
    """Return the fixed orthonormal projection, (traits, 512)."""
    raw = numpy_generator(SEED, "portrait").standard_normal((DIMENSION, len(TRAITS)))
    basis, upper = np.linalg.qr(raw)
    out: NDArray[np.float64] = (basis * np.sign(np.diag(upper))).T
    return out


def traits(vector: ArrayLike) -> dict[str, float]:
    """Return traits of a 512-vector: standard normal for "_x"/"_y", uniform in (0, 1) otherwise.

    Raises:
        LineageError: for another shape, or values that are not finite.
    """
    z = np.asarray(vector, dtype=np.float64)
    if z.shape != (DIMENSION,) or not bool(np.isfinite(z).all()):
        raise LineageError(f"vector of shape {z.shape}: must be ({DIMENSION},) and finite")
    raw = projection() @ z
    return {
        name: float(value if name.endswith(("_x", "_y")) else ndtr(value))
        for name, value in zip(TRAITS, raw, strict=True)
    }


def mix(a: Colour, b: Colour, share: float) -> Colour:
    """Return the colour between ``a`` (share 0) and ``b`` (share 1)."""
    s = min(1.0, max(0.0, share))
    return (a[0] + s * (b[0] - a[0]), a[1] + s * (b[1] - a[1]), a[2] + s * (b[2] - a[2]))


NEAR = 0.6
"""Distance from 0 within which colours fade; 16 % of normal pairs lie there."""


def around(wheel: Sequence[Colour], x: float, y: float) -> Colour:
    """Return a colour on a closed palette at the angle of (x, y); the palette's mean at 0."""
    position = (np.arctan2(y, x) / (2 * np.pi) % 1.0) * len(wheel)
    i = int(position) % len(wheel)
    share = position - int(position)
    share = share * share * (3 - 2 * share)  # rest longer on the named colours
    found = mix(wheel[i], wheel[(i + 1) % len(wheel)], share)
    mean = np.mean(wheel, axis=0)
    neutral: Colour = (float(mean[0]), float(mean[1]), float(mean[2]))
    return mix(neutral, found, step(float(np.hypot(x, y)), 0.0, NEAR))


def hue(x: float, y: float, saturation: float, value: float) -> Colour:
    """Return a hue at the angle of (x, y), grey at 0."""
    saturation *= step(float(np.hypot(x, y)), 0.0, NEAR)
    h = (np.arctan2(y, x) / (2 * np.pi) % 1.0) * 6.0
    parts = [
        value * (1 - saturation * max(0.0, min(1.0, min(k, 4 - k))))
        for k in ((n + h) % 6.0 for n in (5, 3, 1))
    ]
    return (parts[0], parts[1], parts[2])


def step(value: float, start: float, end: float) -> float:
    """Return 0 below ``start``, 1 above ``end``, and a smooth value between."""
    s = min(1.0, max(0.0, (value - start) / (end - start)))
    return s * s * (3 - 2 * s)


def light(c: Colour) -> float:
    return 0.3 * c[0] + 0.59 * c[1] + 0.11 * c[2]


BLACK: Colour = (0.09, 0.07, 0.08)
WHITE: Colour = (1.0, 0.99, 0.97)
