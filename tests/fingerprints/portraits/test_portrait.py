"""Portraits: smooth, distinct, valid files; the encoder that feeds them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from fedsplit.errors import ConfigError, LineageError, ModelError
from fedsplit.fingerprints import WeightView
from fedsplit.fingerprints.evidence import public_file
from fedsplit.fingerprints.portraits import encoder
from fedsplit.fingerprints.portraits.canvas import Canvas, ellipse
from fedsplit.fingerprints.portraits.portrait import draw, portrait_svg
from fedsplit.fingerprints.portraits.sheet import draw_sheet, sheet_image, wrap
from fedsplit.fingerprints.portraits.traits import COATS, around, hue, projection, traits
from fedsplit.seeding import numpy_generator


def _vectors(count: int) -> list[Any]:
    generator = numpy_generator(0, "portrait-test")
    return [generator.standard_normal(512) for _ in range(count)]


def _pixels(vector: Any) -> Any:
    return np.asarray(draw(vector).image(64), dtype=float)


def test_near_vectors_look_alike_and_strangers_differ() -> None:
    vectors = _vectors(9)
    noise = vectors.pop()
    strangers, relatives = [], []
    pictures = [_pixels(v) for v in vectors]
    for i, (vector, picture) in enumerate(zip(vectors, pictures, strict=True)):
        near = _pixels(0.99 * vector + np.sqrt(1 - 0.99**2) * noise)
        relatives.append(np.abs(near - picture).mean())
        strangers += [np.abs(p - picture).mean() for p in pictures[:i]]
    assert max(relatives) < min(strangers)
    assert np.mean(relatives) < 0.35 * np.mean(strangers)


def test_identical_vectors_give_identical_files_that_parse() -> None:
    vector = _vectors(1)[0]
    svg, image = portrait_svg(vector), draw(vector).image(96)
    assert svg == portrait_svg(vector)
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert (image.size, image.mode) == ((96, 96), "RGB")
    assert image.tobytes() == draw(vector).image(96).tobytes()


def test_a_shape_covers_its_area_within_its_clip() -> None:
    size = 100
    disc, half = Canvas(), Canvas()
    disc.add(ellipse(100, 100, 60, 40, n=200), (0.0, 0.0, 0.0))
    left = np.array([(0.0, 0.0), (100.0, 0.0), (100.0, 200.0), (0.0, 200.0)])
    half.add(ellipse(100, 100, 60, 40, n=200), (0.0, 0.0, 0.0), 0.5, left)
    half.add(ellipse(300, 300, 60, 40), (0.0, 0.0, 0.0))  # outside of the picture
    dark = [1 - np.asarray(c.image(size), dtype=float)[..., 0] / 255 for c in (disc, half)]
    area = np.pi * 60 * 40 * (size / 200) ** 2
    assert dark[0].sum() == pytest.approx(area, rel=0.01)
    assert dark[1].sum() == pytest.approx(area / 4, rel=0.02)
    assert dark[1][:, 51:].max() == 0
    assert np.abs(dark[0] - dark[0][::-1, ::-1]).max() < 0.15  # symmetric but for rounding


def test_projection_is_orthonormal_and_traits_are_bounded() -> None:
    basis = projection()
    np.testing.assert_allclose(basis @ basis.T, np.eye(len(basis)), atol=1e-12)
    values = traits(10 * _vectors(1)[0])
    assert all(0 <= v <= 1 for n, v in values.items() if not n.endswith(("_x", "_y")))


def test_colours_do_not_jump_where_an_angle_would() -> None:
    """Opposite directions of a tiny vector give nearly one colour, of a long one two."""
    for wheel in (lambda x, y: hue(x, y, 0.7, 0.8), lambda x, y: around(COATS, x, y)):
        tiny = np.subtract(wheel(1e-3, 0.0), wheel(-1e-3, 0.0))
        long = np.subtract(wheel(1.0, 0.0), wheel(-1.0, 0.0))
        assert np.abs(tiny).max() < 0.01 < 0.2 < np.abs(long).max()


def test_a_drawn_sheet_has_bases_in_a_band_and_labels(tmp_path: Path) -> None:
    a, b = _vectors(2)
    columns = [("one", [("base", a), ("tuned on something long", a)]), ("two", [("base", b)])]
    page = np.asarray(sheet_image(columns, size=48))
    band, rest = page[0, 0], page[-1, 0]
    assert not np.array_equal(band, rest)
    left, right = page[:, : page.shape[1] // 2], page[:, page.shape[1] // 2 :]
    assert (left[-60:] != 255).any()
    assert (right[-60:] == 255).all()
    draw_sheet(columns, tmp_path / "sheet.png", size=48)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "sheet.png")), page)
    with pytest.raises(LineageError, match="at least its base"):
        sheet_image([("one", [])])
    with pytest.raises(ConfigError, match="size=8"):
        sheet_image(columns, size=8)
    with pytest.raises(LineageError, match="cannot be written"):
        draw_sheet(columns, tmp_path / "none" / "sheet.png", size=24)


def test_labels_break_between_words_and_end_where_there_is_no_room() -> None:
    def fits(text: str) -> bool:
        return len(text) <= 12

    assert wrap("short", fits) == ["short"]
    assert wrap("further-trained", fits) == ["further-", "trained"]
    assert wrap("further-trained on text", fits) == ["further-", "trained o..."]
    assert wrap("x" * 30, fits) == ["x" * 12, "x" * 9 + "..."]
    assert wrap("né\n", fits) == ["n?"]
    assert wrap(" ", fits) == []
    assert wrap("ab", lambda _: False) == ["a", "b..."]


def test_bad_vectors() -> None:
    for bad in (np.zeros(511), np.full(512, np.nan)):
        with pytest.raises(LineageError, match="must be"):
            draw(bad)


def test_a_short_training_learns_locality_and_is_reproducible(tmp_path: Path) -> None:
    config = encoder.EncoderConfig(steps=12, batch=8, rank=16)
    one, two = encoder.train_encoder(config), encoder.train_encoder(config)
    for p, q in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q)
    anchor, positive = encoder.synthetic(16, 16, torch.Generator().manual_seed(3))
    with torch.no_grad():
        z, near = one(anchor), one(positive)
    assert float(torch.cosine_similarity(z, near).mean()) > 0.7
    assert abs(float(torch.cosine_similarity(z, z.roll(1, 0)).mean())) < 0.4
    torch.testing.assert_close(z.std(1), torch.ones(16))
    path = tmp_path / "encoder.safetensors"
    encoder.save(one, path, config)
    with torch.no_grad():
        torch.testing.assert_close(encoder.load(path)(anchor), z, atol=0.05, rtol=0.05)


def test_bad_encoder_files(tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    path.write_bytes(b"nonsense")
    with pytest.raises(ModelError, match="not this encoder's weights"):
        encoder.load(path)
    with pytest.raises(ConfigError, match="steps"):
        encoder.EncoderConfig(steps=0)


def test_the_shipped_encoder_keeps_relatives_together(tiny: Callable[..., Any]) -> None:
    net = encoder.load()
    base = tiny("llama")
    other = tiny("llama", seed=5)
    near = tiny("llama")
    with torch.no_grad():
        for p in near.parameters():
            p.add_(0.05 * p.std() * torch.randn_like(p))
    z = [
        encoder.vector(public_file.make(WeightView.of_module(m), "m"), net)
        for m in (base, near, other)
    ]
    cos = np.corrcoef(np.stack(z))
    assert cos[0, 1] > 0.95
    assert abs(cos[0, 2]) < 0.35
    small = public_file.make(WeightView.of_module(base), "m", size=8)
    with pytest.raises(LineageError, match="size=8"):
        encoder.vector(small, net)
