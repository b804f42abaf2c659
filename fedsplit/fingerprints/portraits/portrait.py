"""A dog for a model: near vectors look alike, strangers plainly differ.

HuRef (arXiv 2312.04828), section 5, feeds its 512-vector to a StyleGAN2 trained on AFHQ dogs, whose
weights cannot be redistributed.  The generator only has to be smooth, so this one draws: see
:mod:`fedsplit.fingerprints.portraits.traits` for how the vector becomes traits.  A picture is for
people; decisions are :mod:`fedsplit.fingerprints.gate.verdict`'s.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from fedsplit.fingerprints.portraits.canvas import (
    Canvas,
    Colour,
    Points,
    ellipse,
    mirrored,
    smooth,
    stroke,
)
from fedsplit.fingerprints.portraits.traits import (
    BLACK,
    COATS,
    EYES,
    WHITE,
    around,
    hue,
    light,
    mix,
    step,
    traits,
)


def draw(vector: ArrayLike) -> Canvas:
    """Draw the portrait of a 512-vector.

    Raises:
        LineageError: for a vector of another shape or with values that are not finite.
    """
    t = traits(vector)
    canvas = Canvas()
    coat = around(COATS, t["coat_x"], t["coat_y"])
    second = around(COATS[::-1], t["mark_x"], t["mark_y"])
    if abs(light(coat) - light(second)) < 0.25:  # markings must show
        gap = 0.25 - abs(light(coat) - light(second))
        second = mix(second, WHITE if light(coat) < 0.55 else (0.25, 0.15, 0.10), 2.2 * gap)
    _background(canvas, t)
    _body(canvas, t, coat, second)
    ears_front = t["ear_droop"] > 0.55
    if not ears_front:
        _ears(canvas, t, coat, second)
    head = _head(canvas, t, coat)
    _markings(canvas, t, coat, second, head)
    if ears_front:
        _ears(canvas, t, coat, second)
    _muzzle(canvas, t, coat, second)
    _eyes(canvas, t, coat)
    return canvas


def _background(canvas: Canvas, t: dict[str, float]) -> None:
    base = hue(t["ground_x"], t["ground_y"], 0.36, 0.88)
    square = np.array([(0.0, 0.0), (200.0, 0.0), (200.0, 200.0), (0.0, 200.0)])
    canvas.add(square, base)
    canvas.add(ellipse(100, 100, 78 + 20 * t["halo"], 78 + 20 * t["halo"]), WHITE, 0.28)
    show = step(t["dots"], 0.35, 0.7)
    for i in range(8):
        x = 12.5 + 25 * i
        for y in (14.0, 186.0):
            canvas.add(ellipse(x, y, 4.5 * show, 4.5 * show), WHITE, 0.55 * show)


def _body(canvas: Canvas, t: dict[str, float], coat: Colour, second: Colour) -> None:
    wide = 50 + 14 * t["fluff"]
    torso = smooth(
        [
            (100 - wide, 215),
            (100 - wide + 3, 180),
            (74, 158),
            (100, 150),
            (126, 158),
            (100 + wide - 3, 180),
            (100 + wide, 215),
        ]
    )
    canvas.add(torso, mix(coat, BLACK, 0.13))
    bib = smooth([(78, 165), (100, 158), (122, 165), (114, 200), (100, 212), (86, 200)])
    canvas.add(bib, second, step(t["chest"], 0.3, 0.6), torso)
    collar = hue(t["collar_x"], t["collar_y"], 0.75, 0.78)
    canvas.add(
        smooth([(67, 163), (100, 173), (133, 163), (134, 171), (100, 182), (66, 171)]), collar
    )
    canvas.add(ellipse(100, 184, 6.5, 6.5), (0.80, 0.62, 0.18))
    canvas.add(ellipse(99, 182.6, 5, 4.6), (0.98, 0.84, 0.42))


def _ears(canvas: Canvas, t: dict[str, float], coat: Colour, second: Colour) -> None:
    droop = t["ear_droop"]
    wide = 13 + 11 * t["ear_width"] + 3 * droop
    long = 40 + 26 * t["ear_length"] + 12 * droop
    x, y = 59 + 8 * t["ear_set"] * (1 - droop) - 5 * droop, 62 - 6 * t["ear_set"] + 2 * droop
    # the ear's axis turns from up (slightly out) over sideways to down; 0 is up, + is outwards
    turn = np.interp(droop, [0.0, 0.35, 0.55, 0.75, 1.0], [0.22, 0.45, 1.75, 2.65, 2.95])
    point = 1.0 - step(droop, 0.25, 0.7)  # prick ears are pointed, hanging ones round
    outline = [
        (-wide, 0.05),
        (-wide * 0.98, 0.38),
        (-wide * (0.62 - 0.22 * point + 0.25 * (1 - point)), 0.76),
        (0.0, 1.0),
        (wide * (0.62 - 0.22 * point + 0.25 * (1 - point)), 0.76),
        (wide * 0.98, 0.38),
        (wide, 0.05),
        (0.0, -0.16),
    ]

    def place(scale: float, reach: float) -> Points:
        out = []
        for across, along in outline:
            a, b = across * scale, along * long * reach
            out.append(
                (x - np.sin(turn) * b - np.cos(turn) * a, y - np.cos(turn) * b + np.sin(turn) * a)
            )
        return smooth(out)

    dark = mix(coat, BLACK, 0.10 + 0.22 * t["ear_dark"])
    dark = mix(dark, second, 0.75 * step(t["ear_dark"], 0.62, 0.85))
    inner = mix((0.93, 0.68, 0.66), coat, 0.35)
    for flip in (False, True):
        outer, shade, pink = place(1.0, 1.0), place(0.82, 0.92), place(0.55, 0.80)
        shapes = [mirrored(s) if flip else s for s in (outer, shade, pink)]
        canvas.add(shapes[0], mix(dark, BLACK, 0.22))
        canvas.add(shapes[1], dark)
        canvas.add(shapes[2], inner, 0.85 * point)


def _head(canvas: Canvas, t: dict[str, float], coat: Colour) -> Points:
    wide = 45 + 11 * t["face_width"]
    cheek = wide + 8 * (t["cheek"] - 0.35) + 5 * t["fluff"]
    jaw = 28 + 14 * t["jaw"]
    top = 44 - 7 * t["brow"]
    right = [
        (100, top - 2),
        (100 + 0.50 * wide, top + 4),
        (100 + 0.86 * wide, top + 24),
        (100 + wide, 88),
        (100 + cheek, 112),
        (100 + 0.5 * (cheek + jaw), 136),
        (100 + jaw * 0.8, 154),
    ]
    points = [*right, (100, 163), *[(200 - x, y) for x, y in right[:0:-1]]]
    outline = smooth([(float(a), float(b)) for a, b in points])
    middle = outline.mean(0)
    canvas.add((outline - middle) * 1.022 + middle, mix(coat, BLACK, 0.30))
    canvas.add(outline, coat)
    tuft = t["fluff"]
    for flip in (False, True):
        for k in range(3):
            y = 108 + 11 * k
            edge = 100 + cheek - 2 - 3.2 * k
            lock = smooth([(edge - 8, y - 6), (edge + 2 + 11 * tuft, y + 5), (edge - 9, y + 8)])
            canvas.add(mirrored(lock) if flip else lock, coat)
    canvas.add(ellipse(100, top + 12, 0.5 * wide, 9), WHITE, 0.06, outline)
    return outline


def _markings(
    canvas: Canvas, t: dict[str, float], coat: Colour, second: Colour, head: Points
) -> None:
    mask = step(t["mask"], 0.45, 0.75)
    face = smooth(
        [(100, 84), (122, 92), (140, 118), (134, 150), (100, 168), (66, 150), (60, 118), (78, 92)]
    )
    canvas.add(face, second, 0.95 * mask, head)
    for side, name in ((1.0, "right_patch"), (-1.0, "left_patch")):
        grown = step(t[name], 0.4, 0.85)
        canvas.add(
            ellipse(100 + side * 25, 88, 8 + 17 * grown, 10 + 18 * grown, -side * 0.35),
            second,
            step(t[name], 0.4, 0.55),
            head,
        )
    blaze = step(t["blaze"], 0.35, 0.9)
    stripe = smooth(
        [
            (100, 30),
            (100 + 3 + 15 * blaze, 40),
            (100 + 2 + 7 * blaze, 80),
            (100 + 6 + 16 * blaze, 118),
            (100, 130),
            (100 - 6 - 16 * blaze, 118),
            (100 - 2 - 7 * blaze, 80),
            (100 - 3 - 15 * blaze, 40),
        ]
    )
    canvas.add(stripe, mix(second, WHITE, 0.45), step(t["blaze"], 0.35, 0.5), head)
    spots = step(t["spots"], 0.55, 0.85)
    ink = mix(coat, BLACK, 0.55) if light(coat) > 0.35 else mix(coat, WHITE, 0.35)
    for x, y, r in (
        (72, 60, 6),
        (128, 66, 7.5),
        (60, 104, 5.5),
        (143, 108, 6.5),
        (112, 54, 4),
        (84, 71, 4),
        (136, 88, 4.5),
        (64, 84, 5),
        (88, 52, 3.5),
        (120, 140, 4),
    ):
        canvas.add(ellipse(x, y, r * spots, 0.85 * r * spots, 0.4), ink, 0.85 * spots, head)
    brows = step(t["brows"], 0.5, 0.7)
    tan = (0.83, 0.58, 0.30) if light(coat) < 0.5 else mix(coat, BLACK, 0.45)
    for side in (-1, 1):
        canvas.add(ellipse(100 + side * 24, 74, 6.5, 4.2, side * 0.3), tan, 0.9 * brows, head)


def _muzzle(canvas: Canvas, t: dict[str, float], coat: Colour, second: Colour) -> None:
    wide, long = 22 + 11 * t["muzzle_width"], 20 + 12 * t["muzzle_length"]
    pale = mix(
        mix(coat, second, step(t["mask"], 0.45, 0.75)), WHITE, 0.25 + 0.5 * t["muzzle_light"]
    )
    centre = 118 + 0.35 * long
    nose_y = centre - 0.55 * long + 2
    mouth = centre + 0.38 * long
    tongue = step(t["tongue"], 0.3, 0.75)
    drop = 26 * tongue
    canvas.add(ellipse(100, mouth + 2, 0.5 * wide, 9 + 0.2 * drop), mix(coat, BLACK, 0.55))
    if drop > 1:
        pink = (0.93, 0.45, 0.50)
        tip = mouth + 4 + drop
        canvas.add(
            smooth([(91, mouth), (109, mouth), (110.5, tip - 7), (100, tip), (89.5, tip - 7)]),
            pink,
        )
        canvas.add(stroke([(100, mouth + 3), (100, tip - 6)], 1.8), (0.78, 0.30, 0.37))
    snout = smooth(
        [
            (100, centre - long),
            (100 + 0.62 * wide, centre - 0.62 * long),
            (100 + wide, centre),
            (100 + 0.72 * wide, centre + 0.45 * long),
            (100 + 0.30 * wide, centre + 0.50 * long),
            (100, mouth),
            (100 - 0.30 * wide, centre + 0.50 * long),
            (100 - 0.72 * wide, centre + 0.45 * long),
            (100 - wide, centre),
            (100 - 0.62 * wide, centre - 0.62 * long),
        ]
    )
    canvas.add(snout + np.array([0.0, 1.6]), mix(pale, BLACK, 0.25))
    canvas.add(snout, pale)
    line = mix(pale, BLACK, 0.75)
    canvas.add(stroke([(100, nose_y + 8), (100, mouth)], 2.2), line)
    for side in (-1, 1):
        canvas.add(
            stroke(
                [
                    (100, mouth - 1),
                    (100 + side * 0.28 * wide, mouth + 3.6),
                    (100 + side * 0.62 * wide, mouth + 0.6),
                ],
                2.4,
            ),
            line,
        )
        for k in range(3):
            canvas.add(
                ellipse(
                    100 + side * (0.42 + 0.16 * k) * wide, centre + (3.5 if k == 1 else 0), 1.1, 1.1
                ),
                line,
                0.6,
            )
    size = 10 + 5 * t["nose_size"]
    tone = mix(BLACK, (0.52, 0.28, 0.24), step(t["nose_tone"], 0.55, 0.95))
    nose = smooth(
        [
            (100 - size, nose_y - 4.0),
            (100, nose_y - 6.8),
            (100 + size, nose_y - 4.0),
            (100 + 0.72 * size, nose_y + 3.6),
            (100, nose_y + 0.78 * size),
            (100 - 0.72 * size, nose_y + 3.6),
        ]
    )
    canvas.add(nose, tone)
    canvas.add(ellipse(100, nose_y - 3.4, 0.45 * size, 1.7), WHITE, 0.42)
    for side in (-1, 1):
        canvas.add(ellipse(100 + side * 0.42 * size, nose_y + 0.8, 2.1, 1.5), BLACK, 0.85)


def _eyes(canvas: Canvas, t: dict[str, float], coat: Colour) -> None:
    gap, size = 21 + 6 * t["eye_gap"], 7.6 + 3.6 * t["eye_size"]
    place = t["eye_colour"] * (len(EYES) - 1)
    i = min(int(place), len(EYES) - 2)
    iris = mix(EYES[i], EYES[i + 1], place - i)
    rim = mix(coat, BLACK, 0.72 if light(coat) > 0.3 else 0.4)
    if light(coat) <= 0.3:
        rim = mix(coat, BLACK, 0.6)
    for side in (-1, 1):
        x, y = 100 + side * gap, 91.0
        canvas.add(ellipse(x, y, size + 2.0, size * 0.92 + 2.0, side * 0.12), rim)
        canvas.add(ellipse(x, y, size, size * 0.92, side * 0.12), (0.97, 0.96, 0.94))
        eye = ellipse(x, y, size, size * 0.92, side * 0.12)
        canvas.add(ellipse(x - side * 0.5, y + 0.3, 0.86 * size, 0.86 * size), iris, 1.0, eye)
        canvas.add(ellipse(x - side * 0.5, y + 0.3, 0.50 * size, 0.50 * size), BLACK, 1.0, eye)
        canvas.add(ellipse(x - 2.2, y - 2.8, 0.24 * size, 0.24 * size), WHITE)
        canvas.add(ellipse(x + 2.0, y + 2.6, 0.11 * size, 0.11 * size), WHITE, 0.8)
        lid = size * (2.0 - 0.75 * t["eye_lid"])
        canvas.add(
            ellipse(x, y - lid, 1.35 * size, 0.98 * size, side * 0.25),
            mix(coat, BLACK, 0.12),
            1.0,
            ellipse(x, y, size + 2.2, size * 0.92 + 2.2, side * 0.12),
        )
        canvas.add(
            stroke(
                [
                    (x - side * 7, y - size - 6.5 + 2 * t["brow"]),
                    (x + side * 1, y - size - 8.5),
                    (x + side * 9, y - size - 5.0),
                ],
                2.6,
            ),
            rim,
            0.55,
        )


def portrait_svg(vector: ArrayLike, size: int = 512) -> str:
    """Return the portrait as an SVG document."""
    return draw(vector).svg(size)
