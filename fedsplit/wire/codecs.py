"""How float tensors become bytes: fp32, bf16, or int8 with one scale per row.

Rounding happens after the privacy mechanism, so by post-processing it costs no privacy.  Bytes per
token of width d: fp32 4d, bf16 2d, int8 d + 4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from fedsplit.errors import FrameError
from fedsplit.registry import pick

# Larger values become infinite in bf16, though they are finite in fp32.
_MAX_SENT = float(torch.finfo(torch.bfloat16).max)
_MAX_AXIS = 1 << 31


@dataclass(frozen=True)
class Codec:
    """One wire form.

    Attributes:
        name: its name in settings and frames.
        row_bytes: width d -> bytes of one row of d numbers.
        encode: float tensor (N, d) -> bytes.
        decode: bytes, N, d -> float32 tensor (N, d), values not yet checked.
    """

    name: str
    row_bytes: Callable[[int], int]
    encode: Callable[[Tensor], bytes]
    decode: Callable[[bytes | memoryview, int, int], Tensor]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _encode_fp32(rows: Tensor) -> bytes:
    return _bytes(rows.to(torch.float32))


def _decode_fp32(data: bytes | memoryview, n: int, d: int) -> Tensor:
    # A private writable copy: the frame's bytes are immutable and shared with the transport.
    return torch.frombuffer(bytearray(data), dtype=torch.float32).view(n, d)


def _encode_bf16(rows: Tensor) -> bytes:
    return _bytes(rows.to(torch.bfloat16))


def _decode_bf16(data: bytes | memoryview, n: int, d: int) -> Tensor:
    rows = torch.empty((n, d), dtype=torch.float32)
    # bf16 is the upper half of fp32: widened straight from the frame, then shifted in place.
    bits = rows.numpy().view(np.uint32)
    bits[...] = np.frombuffer(data, "<u2").reshape(n, d)
    bits <<= 16
    return rows


def _encode_int8(rows: Tensor) -> bytes:
    rows = rows.to(torch.float32)
    scale = rows.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / 127.0  # (N, 1)
    levels = torch.round(rows / scale).clamp_(-127, 127).to(torch.int8)  # (N, d)
    return _bytes(scale) + _bytes(levels)


def _decode_int8(data: bytes | memoryview, n: int, d: int) -> Tensor:
    rows = torch.empty((n, d), dtype=torch.float32)
    scale = np.frombuffer(data, "<f4", count=n).reshape(n, 1)
    levels = np.frombuffer(data, np.int8, offset=4 * n).reshape(n, d)
    with np.errstate(all="ignore"):  # a hostile scale; the caller checks what comes out
        np.multiply(levels, scale, out=rows.numpy())
    return rows


CODECS: dict[str, Codec] = {
    "fp32": Codec("fp32", lambda d: 4 * d, _encode_fp32, _decode_fp32),
    "bf16": Codec("bf16", lambda d: 2 * d, _encode_bf16, _decode_bf16),
    "int8": Codec("int8", lambda d: d + 4, _encode_int8, _decode_int8),
}


def encode_rows(rows: Tensor, codec: str) -> bytes:
    """Return the bytes of a tensor whose last axis is d; leading axes are flattened to rows.

    Args:
        rows: (..., d), any float dtype, on any device.
        codec: a row of ``CODECS``.

    Raises:
        FrameError: if a value is NaN or infinite (also once it is bf16): it must not leave, and
            would poison the peer; or if the tensor has no axis.
        ConfigError: if the codec is unknown.
    """
    row = pick(CODECS, codec, "codec")
    if rows.ndim == 0:
        raise FrameError("tensor to send: must have at least one axis")
    if rows.numel() == 0:
        return b""
    flat = rows.detach().reshape(-1, rows.shape[-1]).cpu()
    if not _peak(flat) <= _MAX_SENT:
        raise FrameError("tensor to send holds NaN or infinite values: must be finite")
    return row.encode(flat)


def decode_rows(
    data: bytes | memoryview, shape: Sequence[int], codec: str, *, max_abs: float = 1e6
) -> Tensor:
    """Return the float32 tensor of ``shape`` held in ``data``.

    Args:
        data: bytes made by :func:`encode_rows`.
        shape: expected shape, from what this side already knows, not only from the frame.
        codec: a row of ``CODECS``.
        max_abs: largest magnitude accepted.

    Raises:
        FrameError: if the shape or length does not match, or values are NaN, infinite or over
            ``max_abs``.
    """
    if codec not in CODECS:
        raise FrameError(f"codec={codec!r}: must be one of {', '.join(CODECS)}")
    row = CODECS[codec]
    if not shape or not all(0 <= int(size) < _MAX_AXIS for size in shape):
        raise FrameError(f"tensor shape {tuple(shape)}: must have axes, each in [0, 2^31)")
    n, d = prod(int(size) for size in shape[:-1]), int(shape[-1])
    expected = n * row.row_bytes(d) if n and d else 0
    if len(data) != expected:
        raise FrameError(
            f"tensor body of {len(data)} bytes: must be {expected} for {tuple(shape)} in {codec}"
        )
    if expected == 0:
        return torch.zeros(tuple(shape))
    values = row.decode(data, n, d)
    peak = _peak(values)
    if not peak <= max_abs:  # also false for NaN
        raise FrameError(f"tensor magnitude {peak}: must be finite and <= {max_abs:g}")
    return values.view(tuple(shape))


def _peak(rows: Tensor) -> float:
    """Return the largest magnitude, NaN if there is one; in one pass and without a copy."""
    low, high = rows.aminmax()
    return float(torch.maximum(-low, high))
