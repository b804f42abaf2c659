"""How float tensors become bytes: fp32, bf16, or int8 with one scale per row.

Rounding happens after the privacy mechanism, so by post-processing it costs no privacy.  Bytes per
token of width d: fp32 4d, bf16 2d, int8 d + 4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsplit.errors import FrameError
from fedsplit.registry import pick


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


def _from(data: bytes | memoryview, dtype: torch.dtype) -> Tensor:
    # A private writable copy: the frame's bytes are immutable and shared with the transport.
    return torch.frombuffer(bytearray(data), dtype=dtype)


def _encode_fp32(rows: Tensor) -> bytes:
    return _bytes(rows.to(torch.float32))


def _decode_fp32(data: bytes | memoryview, n: int, d: int) -> Tensor:
    return _from(data, torch.float32).view(n, d)


def _encode_bf16(rows: Tensor) -> bytes:
    return _bytes(rows.to(torch.bfloat16))


def _decode_bf16(data: bytes | memoryview, n: int, d: int) -> Tensor:
    return _from(data, torch.bfloat16).view(n, d).to(torch.float32)


def _encode_int8(rows: Tensor) -> bytes:
    rows = rows.to(torch.float32)
    scale = rows.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / 127.0  # (N, 1)
    levels = torch.round(rows / scale).clamp_(-127, 127).to(torch.int8)  # (N, d)
    return _bytes(scale) + _bytes(levels)


def _decode_int8(data: bytes | memoryview, n: int, d: int) -> Tensor:
    view = memoryview(data)
    scale = _from(view[: 4 * n], torch.float32).view(n, 1)
    return _from(view[4 * n :], torch.int8).view(n, d).to(torch.float32) * scale


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
        FrameError: if a value is NaN or infinite: it must not leave, and would poison the peer.
        ConfigError: if the codec is unknown.
    """
    row = pick(CODECS, codec, "codec")
    flat = rows.detach().reshape(-1, rows.shape[-1]).cpu()
    if flat.numel() == 0:
        return b""
    if not bool(torch.isfinite(flat).all()):
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
        FrameError: if the length does not match, or values are NaN, infinite or over ``max_abs``.
    """
    if codec not in CODECS:
        raise FrameError(f"codec={codec!r}: must be one of {', '.join(CODECS)}")
    row = CODECS[codec]
    d = int(shape[-1])
    n = 1
    for size in shape[:-1]:
        n *= int(size)
    expected = n * row.row_bytes(d) if n and d else 0
    if len(data) != expected:
        raise FrameError(
            f"tensor body of {len(data)} bytes: must be {expected} for {tuple(shape)} in {codec}"
        )
    if expected == 0:
        return torch.zeros(tuple(shape))
    values = row.decode(data, n, d)
    peak = float(values.abs().max())
    if not peak <= max_abs:  # also false for NaN
        raise FrameError(f"tensor magnitude {peak}: must be finite and <= {max_abs:g}")
    return values.view(tuple(shape))
