"""Throwing damaged frames at the parser: whatever comes, it is a sound frame or a FrameError.

``python -m simulations bench fuzz`` does the same to every other parser, by these values too.
"""

from __future__ import annotations

import json
import random
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedsplit.errors import FrameError
from fedsplit.wire.frames import PREFIX_BYTES, SCHEMA, Frame, Kind, decode, encode

_LAYOUT = struct.Struct("<4sBIIQ")
_LETTERS = 'abz\u00e9\u4e2d\U0001f600\n"\\ '
# As text, because most of them are not values that a JSON writer would produce.
NASTY = (
    "null", "true", "false", "0", "-1", "1.0", "-0.0", "1e999", "-1e999", "NaN", "Infinity",
    "-Infinity", "1e30", "9007199254740992", "18446744073709551616", "9" * 4000, "9" * 6000,
    '""', '"\\ud800"', '"\\u0000"', '"x"', '"' + "x" * 3000 + '"', "[]", "{}", "[0]", "[-1]",
    "[true]", "[1.5]", "[1,[2]]", "[" * 3000, "[" * 800 + "]" * 800, '{"a":' * 500,
    '{"a":1,"a":2}', "[0,0,0,0,0]", "", ",", ":", "]", "\ufeff1",
)  # fmt: skip


@dataclass
class FuzzReport:
    """What became of the cases.

    Attributes:
        cases: frames tried.
        accepted: still sound after the damage (a flipped bit in a body, another number).
        refused: messages' first words -> how many.
        slowest_s: longest time one case took.
        seconds: all of it.
    """

    cases: int = 0
    accepted: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    slowest_s: float = 0.0
    seconds: float = 0.0


def sample_header(kind: Kind, rng: random.Random) -> dict[str, Any]:
    """Return a random header that fits the kind's schema."""
    makers: dict[str, Callable[[], Any]] = {
        "int": lambda: rng.choice((0, 1, rng.getrandbits(63), 2**64 - 1, -(2**63))),
        "str": lambda: "".join(rng.choices('abz\u00e9\u4e2d\U0001f600\n"\\ ', k=rng.randrange(20))),
        "bool": lambda: rng.random() < 0.5,
        "float": lambda: rng.choice((0.0, -1.5, 1e-300, rng.uniform(-1e29, 1e29))),
        "ints": lambda: [rng.randrange(2**53) for _ in range(rng.randrange(20))],
        "shape": lambda: [rng.randrange(100) for _ in range(rng.randrange(5))],
    }
    return {key: makers[type_]() for key, type_ in SCHEMA[kind].items()}


def _prefixed(kind: int, header: bytes, body: bytes) -> bytes:
    return _LAYOUT.pack(b"FSP1", kind, 0, len(header), len(body)) + header + body


def _flip(data: bytearray, rng: random.Random) -> bytes:
    for _ in range(rng.randrange(1, 8)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def _cut(data: bytearray, rng: random.Random) -> bytes:
    return bytes(data[: rng.randrange(len(data))])


def _extend(data: bytearray, rng: random.Random) -> bytes:
    return bytes(data) + rng.randbytes(rng.randrange(1, 64))


def _splice(data: bytearray, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    data[at : at + rng.randrange(16)] = rng.randbytes(rng.randrange(16))
    return bytes(data)


def _relabel(data: bytearray, rng: random.Random) -> bytes:
    fields = list(_LAYOUT.unpack_from(data))
    at = rng.randrange(5)
    choices: tuple[tuple[Any, ...], ...] = (
        (b"FSP2", b"\0\0\0\0", b"PK\3\4", b"FSP1"),
        (0, 255, rng.randrange(256)),
        (2**32 - 1, rng.getrandbits(32)),
        (0, 2**32 - 1, 2**31, fields[3] + 1, max(0, fields[3] - 1)),
        (2**64 - 1, 2**63, 2**40, fields[4] + 1, max(0, fields[4] - 1)),
    )
    fields[at] = rng.choice(choices[at])
    return _LAYOUT.pack(*fields) + bytes(data[PREFIX_BYTES:])


def _rewrite(header: Mapping[str, Any], rng: random.Random) -> str:
    """Return JSON-like text of the header with one key replaced, doubled, dropped or added."""
    parts = [f"{json.dumps(key)}:{json.dumps(value)}" for key, value in header.items()]
    at = rng.randrange(len(parts))
    key = list(header)[at]
    way = rng.randrange(6)
    if way < 3:
        parts[at] = f'"{key}":{rng.choice(NASTY)}'
    elif way == 3:
        parts.append(parts[at] if rng.random() < 0.5 else f'"{key}":{rng.choice(NASTY)}')
    elif way == 4:
        del parts[at]
    else:
        parts.append(f'"{rng.choice(("x", "Step", "step ", "__class__", ""))}":0')
    return rng.choice(NASTY) if rng.random() < 0.05 else "{" + ",".join(parts) + "}"


_DAMAGE = (_flip, _cut, _extend, _splice, _relabel)


def sample_frames(rng: random.Random, per_kind: int = 20) -> list[Frame]:
    """Return random sound frames of every kind."""
    return [
        Frame(kind, sample_header(kind, rng), rng.randbytes(rng.randrange(48)))
        for kind in Kind
        for _ in range(per_kind)
    ]


def damaged(frame: Frame, rng: random.Random) -> bytes:
    """Return the bytes of ``frame`` with one kind of damage."""
    way = rng.randrange(len(_DAMAGE) + 4)
    if way < len(_DAMAGE):
        return _DAMAGE[way](bytearray(encode(frame, rng.getrandbits(32), 1 << 20)), rng)
    if way == len(_DAMAGE):
        other = rng.choice(("utf-16", "utf-32", "utf-8-sig", "utf-7"))
        return _prefixed(frame.kind, json.dumps(dict(frame.header)).encode(other), b"")
    if way == len(_DAMAGE) + 1:
        return rng.randbytes(rng.randrange(96))
    text = _rewrite(frame.header, rng).encode("utf-8", "surrogatepass")
    return _prefixed(frame.kind, text, bytes(frame.body))


def fuzz(cases: int, seed: int, max_bytes: int = 1 << 20) -> FuzzReport:
    """Try ``cases`` damaged frames; the same seed tries the same ones.

    Raises:
        AssertionError: the parser raised anything but FrameError, or took a frame that does not
            encode to itself; carries the frame in hexadecimal.
    """
    rng = random.Random(seed)
    frames = sample_frames(rng)
    report = FuzzReport()
    begin = time.perf_counter()
    for _ in range(cases):
        data = damaged(rng.choice(frames), rng)
        start = time.perf_counter()
        try:
            frame = decode(data, max_bytes)
        except FrameError as error:
            reason = " ".join(str(error).split(":")[0].split()[:3])
            report.refused[reason] = report.refused.get(reason, 0) + 1
        except BaseException as error:
            raise AssertionError(f"{type(error).__name__} on {data.hex()}") from error
        else:
            again = decode(encode(frame, frame.sequence, 2 * max_bytes), 2 * max_bytes)
            if again != frame:
                raise AssertionError(f"not the same when encoded again: {data.hex()}")
            report.accepted += 1
        report.slowest_s = max(report.slowest_s, time.perf_counter() - start)
        report.cases += 1
    report.seconds = time.perf_counter() - begin
    return report
