"""Damaging sound input: bits, lengths, and the values that JSON, TOML and safetensors carry.

A parser that checks a hash first is never reached by flipped bits, and hostile input comes with the
right hash.  So what is damaged is the value inside, wherever it is, and the caller seals it again.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Mapping
from typing import Any

from fedsplit.wire.fuzz import NASTY

_OFFSETS = struct.Struct("<Q")


def flipped(data: bytes, rng: random.Random) -> bytes:
    """Return ``data`` with bits flipped, a piece cut out, put in, doubled or missing at the end."""
    found = bytearray(data or b"\0")
    at = rng.randrange(len(found))
    match rng.randrange(6):
        case 0:
            for _ in range(rng.randrange(1, 8)):
                found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
        case 1:
            del found[at:]
        case 2:
            del found[at : at + rng.randrange(1, 64)]
        case 3:
            found[at:at] = rng.randbytes(rng.randrange(1, 64))
        case 4:
            found[at:at] = found[at : at + rng.randrange(1, 256)]
        case _:
            found += rng.randbytes(rng.randrange(1, 64))
    return bytes(found)


def damaged_text(text: str, rng: random.Random) -> str:
    """Return ``text`` with one of its words replaced by a nasty value, or by nothing."""
    at = rng.randrange(len(text) + 1)
    end = at + rng.randrange(12)
    put = rng.choice((*NASTY, "\x00", "\u2028", "=", "[[", "'''", "#", "\\", "\n" * 50))
    return text[:at] + (put if rng.random() < 0.8 else "") + text[end:]


def damaged_json(value: Any, rng: random.Random) -> str:
    """Return JSON-like text of ``value`` with one value or key in it, at any depth, damaged."""
    target, seen = rng.randrange(_size(value)), 0

    def dump(part: Any) -> str:
        nonlocal seen
        mine = seen == target
        seen += 1
        if mine and not isinstance(part, (dict, list)):
            return rng.choice(NASTY)
        if isinstance(part, dict):
            return _object(part, dump, rng, mine)
        if isinstance(part, list):
            return _array(part, dump, rng, mine)
        return json.dumps(part)

    return dump(value)


def _size(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + sum(map(_size, value.values()))
    if isinstance(value, list):
        return 1 + sum(map(_size, value))
    return 1


def _object(
    part: Mapping[str, Any], dump: Callable[[Any], str], rng: random.Random, mine: bool
) -> str:
    rows = [f"{json.dumps(key)}:{dump(inner)}" for key, inner in part.items()]
    if mine:
        way = rng.randrange(5)
        if way == 0 or not rows:
            return rng.choice(NASTY)
        if way == 1:
            del rows[rng.randrange(len(rows))]
        elif way == 2:
            rows.append(rng.choice(rows))
        elif way == 3:
            key = rng.choice(("x", "__class__", "", "auto_map", "../x", "\\ud800"))
            rows.append(f'"{key}":{rng.choice(NASTY)}')
        else:
            at = rng.randrange(len(rows))
            rows[at] = f"{json.dumps(list(part)[at])}:{rng.choice(NASTY)}"
    return "{" + ",".join(rows) + "}"


def _array(part: list[Any], dump: Callable[[Any], str], rng: random.Random, mine: bool) -> str:
    rows = [dump(inner) for inner in part]
    if mine:
        way = rng.randrange(4)
        if way == 0:
            return rng.choice(NASTY)
        if way == 1 and rows:
            del rows[rng.randrange(len(rows))]
        elif way == 2:
            rows.append(rng.choice(NASTY))
        else:
            rows *= rng.choice((0, 2, 1000))
    return "[" + ",".join(rows) + "]"


def damaged_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Return a safetensors file with its header's values, its lengths or its bytes damaged."""
    way = rng.randrange(4)
    if way == 0:
        return flipped(data, rng)
    (length,) = _OFFSETS.unpack_from(data)
    header, body = data[8 : 8 + length], data[8 + length :]
    if way == 1:  # numbers in the tensors: NaN, infinities, anything
        found = bytearray(body)
        for _ in range(rng.randrange(1, 5)):
            at = rng.randrange(max(1, len(found) - 4))
            found[at : at + 4] = rng.choice((b"\0\0\xc0\x7f", b"\0\0\x80\xff", rng.randbytes(4)))
        return data[: 8 + length] + bytes(found[: len(body)])
    if way == 2:
        told = rng.choice((0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1, len(data)))
        return _OFFSETS.pack(told) + header + body
    changed = damaged_json(json.loads(header), rng).encode("utf-8", "surrogatepass")
    return _OFFSETS.pack(len(changed)) + changed + body


def damaged_value(value: Any, rng: random.Random) -> Any:
    """Return another value of a type that Flower's records, or a flat config, can carry."""
    others: tuple[Any, ...] = (
        *(0, -1, 1, 2**31, 2**63 - 1, -(2**63), 0.0, -0.5, 1e308, float("inf"), float("nan")),
        *(True, False, "", "x", "x" * 5000, "\x00", "\ud800", "../..", "[::1]:99999", "9" * 400),
        *(b"", b"\xff" * 100, b"x" * 100_000),
    )
    if isinstance(value, str) and value and rng.random() < 0.4:
        return damaged_text(value, rng)
    if isinstance(value, bytes) and rng.random() < 0.4:
        return flipped(value, rng)
    return rng.choice(others)
