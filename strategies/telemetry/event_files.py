"""Scalars in TensorBoard's event files, without TensorBoard.

A file is a sequence of TFRecords (length u64, masked CRC-32C of it, data, masked CRC-32C of the
data; all little-endian), and a record is an ``Event`` message of which six fields are written: wall
time, step, file version, and per value a tag and a number.  Any TensorBoard reads it.
"""

from __future__ import annotations

import math
import os
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from fedsplit.errors import RunError

_MASK = 0xA282EAD8
_VERSION = b"brain.Event:2"


def _table() -> tuple[int, ...]:
    rows = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        rows.append(value)
    return tuple(rows)


_CRC = _table()


def crc32c(data: bytes) -> int:
    """Return the Castagnoli CRC-32 (RFC 3720, appendix B.4)."""
    value = 0xFFFFFFFF
    for byte in data:
        value = value >> 8 ^ _CRC[(value ^ byte) & 0xFF]
    return value ^ 0xFFFFFFFF


def _masked(data: bytes) -> int:
    value = crc32c(data)
    return ((value >> 15 | value << 17) + _MASK) & 0xFFFFFFFF


def record(data: bytes) -> bytes:
    """Return ``data`` as one TFRecord."""
    length = struct.pack("<Q", len(data))
    return b"".join(
        (length, struct.pack("<I", _masked(length)), data, struct.pack("<I", _masked(data)))
    )


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))


def _bytes(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def event(wall_time: float, step: int, scalars: Mapping[str, float]) -> bytes:
    """Return one Event message; ``step`` >= 0, numbers as 32-bit floats."""
    values = b"".join(
        _bytes(1, _bytes(1, tag.encode()) + b"\x15" + struct.pack("<f", value))
        for tag, value in scalars.items()
    )
    return b"\x09" + struct.pack("<d", wall_time) + b"\x10" + _varint(step) + _bytes(5, values)


class EventFile:
    """One new event file; any thread may write.

    Args:
        folder: where TensorBoard's ``--logdir`` points.

    Raises:
        RunError: it cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        now = time.time()
        self.path = folder / f"events.out.tfevents.{int(now)}.fedsplit.{os.getpid()}"
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = open(self.path, "ab", buffering=0)  # noqa: SIM115 - kept open
            self._file.write(record(b"\x09" + struct.pack("<d", now) + _bytes(3, _VERSION)))
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written: {error}") from None

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write the finite ones of ``scalars`` at ``step``.

        Raises:
            OSError: the disk is full.
        """
        kept = {tag: float(v) for tag, v in scalars.items() if math.isfinite(v) and abs(v) < 3e38}
        if kept:
            with self._lock:
                self._file.write(record(event(time.time(), step, kept)))

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._file.close()


def scalars_of(row: Mapping[str, object]) -> Iterator[tuple[str, float]]:
    """Yield (tag, number) of what a round's row in ``server.json`` is drawn by."""
    for mode in ("train", "evaluate"):
        part = row.get(mode)
        if not isinstance(part, Mapping):
            continue
        metrics = part.get("metrics")
        for key in ("loss", "accuracy", "epsilon", "share-touched"):
            value = metrics.get(key) if isinstance(metrics, Mapping) else None
            if isinstance(value, (int, float)):
                yield f"{mode}/{key}", value
        for key in ("bytes_up", "bytes_down", "row_tokens", "wall_s", "compute_s", "waiting_s"):
            if isinstance(value := part.get(key), (int, float)):
                yield f"{mode}/{key}", value
        for key in ("finished", "lost"):
            if isinstance(value := part.get(key), (list, dict)):
                yield f"{mode}/owners_{key}", len(value)
    lineage = row.get("lineage")
    for key in ("score", "pcs", "ics", "worst"):
        value = lineage.get(key) if isinstance(lineage, Mapping) else None
        if isinstance(value, (int, float)):
            yield f"lineage/{key}", value
    if isinstance(value := row.get("plug_in_loss"), (int, float)):
        yield "evaluate/plug_in_loss", value
