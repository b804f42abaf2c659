"""What crosses in the messages of a masked sum: tables of fixed-size rows by an owner's place.

An owner's place is its index in the round's roster.  Every reader bounds what it reads before
anything is made of it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedsplit.errors import SessionError, WireError
from fedsplit.wire.messages import read_array

SECURE = "fedsplit.secure"
MASKED = "fedsplit.masked"
KEYS, SHARES, NUMBERS, CONFIRM, REVEAL = "keys", "shares", "numbers", "confirm", "reveal"
PHASES = (KEYS, SHARES, NUMBERS, CONFIRM, REVEAL)
MOST_PLACES = 100_000
SEALED_BYTES = 94
"""Bytes of two sealed shares: nonce, two shares of 33 bytes, tag."""
DIGEST_BYTES, SIGNATURE_BYTES, SHARE_BYTES = 32, 64, 33
_PLACE = struct.Struct("<I")

Values = dict[str, Any]


def secure_record(phase: str, **values: Any) -> ConfigRecord:
    """Return the record of one phase."""
    return ConfigRecord({"phase": phase, **values})


def read_record(content: RecordDict, phase: str = "") -> Values:
    """Return the values of a message's record.

    Args:
        content: the message's.
        phase: that it must be of; empty: any.

    Raises:
        SessionError: no such record, or of another phase.
    """
    record = content.config_records.get(SECURE)
    found = None if record is None else record.get("phase")
    if record is None or found not in ((phase,) if phase else PHASES):
        raise SessionError(f"message of a masked sum: must be of phase {phase or PHASES}")
    return dict(record)


def bytes_of(values: Values, key: str, most: int) -> bytes:
    """Return a value of bytes.

    Raises:
        SessionError: missing, no bytes, or more than ``most`` of them.
    """
    value = values.get(key)
    if not isinstance(value, bytes) or len(value) > most:
        raise SessionError(f"message of a masked sum: {key} must be at most {most} bytes")
    return value


def rows_of(values: Values, key: str, size: int) -> list[bytes]:
    """Return a value of rows of ``size`` bytes, one behind the other.

    Raises:
        SessionError: see :func:`bytes_of`, or a part of a row.
    """
    text = bytes_of(values, key, size * MOST_PLACES)
    if len(text) % size:
        raise SessionError(f"message of a masked sum: {key} must be rows of {size} bytes")
    return [text[at : at + size] for at in range(0, len(text), size)]


def pack_table(table: Mapping[int, bytes], name: str = "") -> dict[str, bytes]:
    """Return rows of one size by place, as two values of bytes; ``name`` sets two tables apart."""
    places = sorted(table)
    return {
        f"{name}places": pack_places(places),
        f"{name}rows": b"".join(table[at] for at in places),
    }


def table_of(values: Values, size: int, name: str = "") -> dict[int, bytes]:
    """Return what :func:`pack_table` packed.

    Raises:
        SessionError: another number of rows than places, or a place twice.
    """
    places = places_of(values, f"{name}places")
    rows = rows_of(values, f"{name}rows", size)
    if len(places) != len(rows) or len(set(places)) != len(places):
        raise SessionError("message of a masked sum: must have one row for each place")
    return dict(zip(places, rows, strict=True))


def pack_places(places: Sequence[int]) -> bytes:
    """Return places as bytes."""
    return b"".join(_PLACE.pack(at) for at in places)


def places_of(values: Values, key: str) -> list[int]:
    """Return places.

    Raises:
        SessionError: see :func:`rows_of`.
    """
    return [_PLACE.unpack(row)[0] for row in rows_of(values, key, _PLACE.size)]


def masked_record(vector: Any) -> ArrayRecord:
    """Return masked numbers (d,), uint32 or uint64, as Flower arrays."""
    return ArrayRecord({"numbers": Array(vector)})


def masked_numbers(content: RecordDict, dtype: str, size: int) -> Any:
    """Return the masked numbers of a reply, (size,).

    Raises:
        SessionError: none, more arrays, or of another type or size than is due.
    """
    records = content.array_records
    if list(records) != [MASKED] or list(records[MASKED]) != ["numbers"]:
        raise SessionError(f"array records {list(records)[:4]}: must be [{MASKED!r}]")
    try:
        return read_array(records[MASKED]["numbers"], dtype, (size,))
    except WireError as error:
        raise SessionError(f"masked numbers: {error}") from None
