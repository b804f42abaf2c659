"""Portraits: smooth, distinct, valid files; the encoder that feeds them."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from fedsplit.errors import ConfigError, LineageError, ModelError
from fedsplit.fingerprints import WeightView
from fedsplit.fingerprints.evidence import public_file
from fedsplit.fingerprints.portraits import encoder
from fedsplit.fingerprints.portraits.canvas import encode_png
from fedsplit.fingerprints.portraits.lettering import text_mask, wrap, write_text
from fedsplit.fingerprints.portraits.portrait import draw, portrait_png, portrait_svg, sheet_png
from fedsplit.fingerprints.portraits.sheet import draw_sheet, sheet_pixels
from fedsplit.fingerprints.portraits.traits import COATS, around, hue, projection, traits
from fedsplit.seeding import numpy_generator


def _vectors(count: int) -> list[Any]:
    generator = numpy_generator(0, "portrait-test")
    return [generator.standard_normal(512) for _ in range(count)]


def _pixels(vector: Any) -> Any:
    return draw(vector).pixels(64, 2).astype(float)


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
    svg, png = portrait_svg(vector), portrait_png(vector, 96)
    assert svg == portrait_svg(vector)
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    image = pytest.importorskip("PIL.Image").open(BytesIO(png))
    assert image.size == (96, 96)
    np.testing.assert_array_equal(np.asarray(image.convert("RGB")), draw(vector).pixels(96))


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
    page = sheet_pixels(columns, size=48)
    band, rest = page[0, 0], page[-1, 0]
    assert not np.array_equal(band, rest)
    left, right = page[:, : page.shape[1] // 2], page[:, page.shape[1] // 2 :]
    assert (left[-60:] != 255).any()
    assert (right[-60:] == 255).all()
    draw_sheet(columns, tmp_path / "sheet.png", size=48)
    assert (tmp_path / "sheet.png").read_bytes() == encode_png(page)
    with pytest.raises(LineageError, match="at least its base"):
        sheet_pixels([("one", [])])
    with pytest.raises(ConfigError, match="size=8"):
        sheet_pixels(columns, size=8)
    with pytest.raises(LineageError, match="cannot be written"):
        draw_sheet(columns, tmp_path / "none" / "sheet.png", size=24)


def test_lettering_keeps_words_apart_and_inside() -> None:
    mask = text_mask("Wg", 2)
    assert mask.shape == (18, 24)
    assert mask[:, :10].any()
    assert not mask[:, 10:12].any()
    assert not np.array_equal(text_mask("O"), text_mask("0"))
    assert np.array_equal(text_mask("é"), text_mask("?"))
    assert wrap("further-trained on text", 12, 2) == ["further-", "trained on.."]
    assert wrap("short", 12, 2) == ["short"]
    page = np.full((6, 8, 3), 255, np.uint8)
    write_text(page, "WWWW", 4, 2)
    assert (page[:2] == 255).all()
    assert (page[2:, 4:] != 255).any()


def test_sheet_and_bad_vectors() -> None:
    a, b = _vectors(2)
    assert sheet_png([[a, b], [a, None]], size=24)[:4] == b"\x89PNG"
    assert encode_png(np.zeros((2, 3, 3), np.uint8)).endswith(b"IEND\xaeB`\x82")
    with pytest.raises(LineageError, match="no portraits"):
        sheet_png([])
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
