"""Codecs: sizes, error bounds, and what never leaves or enters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.errors import ConfigError, FrameError
from fedsplit.wire.codecs import CODECS, decode_rows, encode_rows

SHAPES = [(1, 1), (3, 7), (2, 3, 5), (1000, 64), (9,)]
ROW_BYTES = {"fp32": lambda d: 4 * d, "bf16": lambda d: 2 * d, "int8": lambda d: d + 4}


def rows_of(shape: tuple[int, ...], seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip_keeps_shape_and_size_is_as_documented(codec: str, shape: tuple[int, ...]):
    rows = rows_of(shape)

    data = encode_rows(rows, codec)
    back = decode_rows(data, shape, codec)

    assert back.shape == rows.shape
    assert back.dtype == torch.float32
    n = rows.numel() // shape[-1]
    assert len(data) == n * ROW_BYTES[codec](shape[-1]) == n * CODECS[codec].row_bytes(shape[-1])


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40))
def test_error_bounds(values: list[float]):
    rows = torch.tensor([values])
    peak = float(rows.abs().max())

    back = {codec: decode_rows(encode_rows(rows, codec), rows.shape, codec) for codec in CODECS}

    assert torch.equal(back["fp32"], rows)
    # 8 significant bits, rounded to nearest: 2^-8 relative; 2^-133 is bf16's smallest step.
    assert bool(((back["bf16"] - rows).abs() <= rows.abs() * 2.0**-8 + 2.0**-133).all())
    # Half of one of 127 steps, plus the rounding of the scale itself.
    assert bool(((back["int8"] - rows).abs() <= peak / 127 * 0.5001 + 1e-30).all())


@pytest.mark.parametrize("seed", range(5))
def test_bf16_equals_torch(seed: int):
    """Every finite bf16 pattern decodes to the number that torch sees in it."""
    patterns = np.arange(1 << 16, dtype="<u2")
    reference = torch.from_numpy(patterns.view(np.int16).copy()).view(torch.bfloat16).float()
    keep = reference.isfinite() & (reference.abs() <= 1e6)
    chosen = patterns[keep.numpy()]

    back = decode_rows(chosen.tobytes(), (1, len(chosen)), "bf16")

    assert torch.equal(back[0], reference[keep])
    rows = rows_of((50, 33), seed, 100.0)
    assert torch.equal(
        decode_rows(encode_rows(rows, "bf16"), rows.shape, "bf16"), rows.bfloat16().float()
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("codec", CODECS)
def test_any_float_type_and_layout(dtype: torch.dtype, codec: str):
    whole = rows_of((8, 12)).to(dtype)
    strided = whole.t()[::2, 1:7]
    strided.requires_grad_(False)

    data = encode_rows(strided, codec)

    assert not strided.is_contiguous()
    assert data == encode_rows(strided.contiguous(), codec)
    assert encode_rows(whole.requires_grad_(), codec) == encode_rows(whole.detach(), codec)


def test_result_is_a_private_writable_copy():
    data = encode_rows(torch.ones(4, 4), "fp32")

    back = decode_rows(data, (4, 4), "fp32")
    back += 1

    assert torch.equal(decode_rows(data, (4, 4), "fp32"), torch.ones(4, 4))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite_is_refused_both_ways(codec: str, value: float):
    rows = torch.zeros(3, 5)
    rows[1, 2] = value
    with pytest.raises(FrameError, match="NaN or infinite"):
        encode_rows(rows, codec)

    data = {
        "fp32": rows.numpy().tobytes(),
        "bf16": rows.bfloat16().view(torch.int16).numpy().tobytes(),
        "int8": np.array([0, value, 0], "<f4").tobytes() + bytes([1] * 15),
    }[codec]
    with pytest.raises(FrameError, match="must be finite"):
        decode_rows(data, (3, 5), codec, max_abs=float("3e38"))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    "rows",
    [
        torch.full((1, 2), 1e300, dtype=torch.float64),  # infinite in fp32
        torch.full((1, 2), 3.4e38),  # infinite in bf16
        torch.full((1, 2), -3.4e38),
    ],
)
def test_what_becomes_infinite_on_the_way_is_refused(codec: str, rows: torch.Tensor):
    with pytest.raises(FrameError, match="NaN or infinite"):
        encode_rows(rows, codec)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("value", [3.3895e38, -3.3895e38, 1e-44, 1e-30])
def test_extreme_finite_values_stay_finite(codec: str, value: float):
    back = decode_rows(encode_rows(torch.tensor([[value]]), codec), (1, 1), codec, max_abs=3.4e38)

    assert bool(back.isfinite().all())
    assert float(back) == pytest.approx(value, rel=2**-7, abs=1e-30)


@pytest.mark.parametrize("codec", CODECS)
def test_wrong_lengths_are_refused(codec: str):
    data = encode_rows(rows_of((4, 6)), codec)

    for wrong in (b"", data[:-1], data + b"\0", data * 2):
        with pytest.raises(FrameError, match="tensor body"):
            decode_rows(wrong, (4, 6), codec)
    for shape in [(4, 7), (5, 6), (2**30, 2**30), (0, 6)]:
        with pytest.raises(FrameError, match="tensor body"):
            decode_rows(data, shape, codec)


@pytest.mark.parametrize("shape", [(), (-1, 6), (2**31, 0), (0, 2**53)])
def test_impossible_shapes_are_refused(shape: tuple[int, ...]):
    with pytest.raises(FrameError, match="tensor shape"):
        decode_rows(b"", shape, "fp32")


@pytest.mark.parametrize("codec", CODECS)
def test_largest_magnitude(codec: str):
    data = encode_rows(torch.tensor([[1.0, -128.0]]), codec)

    assert float(decode_rows(data, (1, 2), codec, max_abs=128.0)[0, 1]) == -128.0
    with pytest.raises(FrameError, match=r"magnitude 128.0: must be finite and <= 127"):
        decode_rows(data, (1, 2), codec, max_abs=127.0)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (2, 0, 3), (0,)])
def test_empty_tensors(codec: str, shape: tuple[int, ...]):
    data = encode_rows(torch.empty(shape), codec)

    assert data == b""
    assert decode_rows(data, shape, codec).shape == shape


@pytest.mark.parametrize("codec", CODECS)
def test_zeros_stay_zeros(codec: str):
    assert not decode_rows(encode_rows(torch.zeros(3, 4), codec), (3, 4), codec).any()


def test_a_number_without_axis_is_refused():
    with pytest.raises(FrameError, match="at least one axis"):
        encode_rows(torch.tensor(1.0), "fp32")


def test_unknown_codecs():
    with pytest.raises(ConfigError, match="bf16, fp32, int8"):
        encode_rows(torch.zeros(1, 1), "fp8")
    with pytest.raises(FrameError, match="codec='fp8'"):
        decode_rows(b"", (1, 1), "fp8")
