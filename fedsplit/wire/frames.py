"""Bounded, typed frames: the only thing a session's stream carries.

Layout, little-endian::

    magic "FSP1" | kind u8 | sequence u32 | header length u32 | body length u64 | header | body

The header is a flat JSON object whose keys and types are fixed per kind (``SCHEMA``); the body is
raw tensor bytes (see :mod:`fedsplit.wire.codecs`) or a slice of a file.  A frame that is longer
than its bound, of an unknown kind, or with a missing, foreign, repeated or mistyped key is refused
before anything is allocated for its body.  Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from fedsplit.errors import FrameError

MAGIC = b"FSP1"
_PREFIX = struct.Struct("<4sBIIQ")
PREFIX_BYTES = _PREFIX.size
KIND_AT = len(MAGIC)
MAX_HEADER_BYTES = 1 << 20  # of a kind with lists; others have at most _SHORT_HEADER_BYTES
_SHORT_HEADER_BYTES = 1 << 16  # a few strings, each character at most 12 bytes when escaped
MAX_INTS = 1 << 17
PROTOCOL = 3


class Kind(IntEnum):
    """Frame kinds, in the order in which a session meets them."""

    HELLO = 1  # owner -> server: who I am, my token, what I have cached
    WELCOME = 2  # server -> owner: accepted; the files' digest, and the codecs
    NEED = 3  # owner -> server: send me the files
    FILE = 4  # server -> owner: one slice of one bundle file
    READY = 5  # owner -> server: data loaded, so many batches follow
    START = 6  # server -> owner: your wave begins; credit for so many batches
    BATCH = 7  # owner -> server: representations of one step's samples (or their slots alone)
    LOGITS = 8  # server -> owner: the top's output for that step (logits, or final hidden states)
    GRAD = 9  # owner -> server: gradient of that step's loss by what LOGITS brought
    HIDDEN_GRAD = 10  # server -> owner: dL/drepresentations of that step (joint bottoms)
    DONE = 11  # owner -> server: no more batches; counts and averages of the session
    BYE = 12  # server -> owner: the session is over
    ERROR = 13  # either way: why this side gives up


# Per kind: key -> type.  "ints" is a list of non-negative integers, "shape" a short one.
SCHEMA: dict[Kind, dict[str, str]] = {
    Kind.HELLO: {
        "protocol": "int",
        "version": "str",
        "token": "str",
        "run": "int",
        "node": "int",
        "round": "int",
        "mode": "str",
        "owner": "str",
        "digest": "str",
        "classes": "str",
    },
    Kind.WELCOME: {"version": "str", "digest": "str", "codec": "str", "logits_codec": "str"},
    Kind.NEED: {"digest": "str"},
    Kind.FILE: {"name": "str", "offset": "int", "size": "int", "last": "bool"},
    Kind.READY: {"batches": "int", "samples": "int", "mechanism": "str"},
    Kind.START: {"window": "int"},
    Kind.BATCH: {
        "step": "int",
        "slots": "ints",
        "fresh": "ints",
        "lengths": "ints",
        "codec": "str",
        "dim": "int",
        "last": "bool",
    },
    Kind.LOGITS: {"step": "int", "codec": "str", "shape": "shape"},
    Kind.GRAD: {"step": "int", "codec": "str", "shape": "shape", "weight": "float"},
    Kind.HIDDEN_GRAD: {"step": "int", "codec": "str", "shape": "shape"},
    Kind.DONE: {"samples": "int", "steps": "int"},
    Kind.BYE: {"reason": "str"},
    Kind.ERROR: {"error": "str", "message": "str"},
}

_LONGEST = {"token": 256, "message": 2000, "reason": 500, "name": 128, "mechanism": 2000}
_SURROGATE = re.compile("[\ud800-\udfff]")
_CHECKS = {"int": int, "str": str, "bool": bool, "float": float}


@dataclass(frozen=True)
class Frame:
    """One frame.

    Attributes:
        kind: what it is.
        header: the kind's keys, exactly as ``SCHEMA`` lists them.
        body: raw bytes (may be empty).
        sequence: position in its direction of the session, from 0; set by the link.
    """

    kind: Kind
    header: Mapping[str, Any] = field(default_factory=dict)
    body: bytes | memoryview = b""
    sequence: int = 0

    def __getitem__(self, key: str) -> Any:
        return self.header[key]


def encode(frame: Frame, sequence: int, max_bytes: int) -> bytes:
    """Return the frame's bytes.

    Raises:
        FrameError: if its header breaks the schema or it is longer than ``max_bytes``.
    """
    _check_header(frame.kind, frame.header)
    if not 0 <= sequence < 1 << 32:
        raise FrameError(f"frame sequence {sequence}: must be in [0, 2^32)")
    header = _TO_JSON.encode(dict(frame.header)).encode()
    _check_header_bytes(frame.kind, len(header))
    total = PREFIX_BYTES + len(header) + len(frame.body)
    if total > max_bytes:
        raise FrameError(f"{frame.kind.name} frame of {total} bytes: must be <= {max_bytes}")
    prefix = _PREFIX.pack(MAGIC, frame.kind, sequence, len(header), len(frame.body))
    return b"".join((prefix, header, frame.body))


def decode(data: bytes, max_bytes: int) -> Frame:
    """Parse one frame; the body is a view into ``data``, not a copy.

    Raises:
        FrameError: naming what is wrong: length, magic, kind, header schema.
    """
    if len(data) > max_bytes:
        raise FrameError(f"frame of {len(data)} bytes: must be <= {max_bytes}")
    if len(data) < PREFIX_BYTES:
        raise FrameError(f"frame of {len(data)} bytes: must be >= {PREFIX_BYTES}")
    magic, kind, sequence, header_bytes, body_bytes = _PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise FrameError(f"frame magic {magic!r}: must be {MAGIC!r}")
    if PREFIX_BYTES + header_bytes + body_bytes != len(data):
        raise FrameError(
            f"frame of {len(data)} bytes announces {PREFIX_BYTES + header_bytes + body_bytes}"
        )
    try:
        kind = Kind(kind)
    except ValueError:
        raise FrameError(f"frame kind {kind}: must be one of {[int(k) for k in Kind]}") from None
    _check_header_bytes(kind, header_bytes)
    view = memoryview(data)
    try:
        # Decoded here: json.loads would take UTF-16, UTF-32 and surrogates in bytes as well.
        text = str(view[PREFIX_BYTES : PREFIX_BYTES + header_bytes], "utf-8")
        header = _FROM_JSON.decode(text)
    except FrameError:
        raise
    except (ValueError, RecursionError) as error:
        raise FrameError(f"{kind.name} header is not JSON: {str(error)[:200]}") from None
    if not isinstance(header, dict):
        raise FrameError(f"{kind.name} header: must be an object, not {type(header).__name__}")
    _check_header(kind, header)
    return Frame(kind, header, view[PREFIX_BYTES + header_bytes :], sequence)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Two readers of one repeated key could see two different values.
    found = dict(pairs)
    if len(found) != len(pairs):
        raise FrameError("header: must not repeat a key")
    return found


def _no_constant(name: str) -> float:
    raise FrameError(f"header: must be JSON, which has no {name}")


# Made once: json.loads and json.dumps make new ones on every call with options.
_FROM_JSON = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)
_TO_JSON = json.JSONEncoder(separators=(",", ":"))


def _check_header_bytes(kind: Kind, size: int) -> None:
    bound = MAX_HEADER_BYTES if "ints" in SCHEMA[kind].values() else _SHORT_HEADER_BYTES
    if size > bound:
        raise FrameError(f"{kind.name} header of {size} bytes: must be <= {bound}")


def _check_header(kind: Kind, header: Mapping[str, Any]) -> None:
    schema = SCHEMA[kind]
    if header.keys() != schema.keys():
        if kind is Kind.HELLO and header.get("protocol") in range(1, PROTOCOL):
            raise FrameError(f"session protocol {header['protocol']}: must be {PROTOCOL}")
        odd = sorted(str(key)[:40] for key in header.keys() ^ schema.keys())[:8]
        raise FrameError(f"{kind.name} header: missing or foreign keys {odd}")
    for key, expected in schema.items():
        value = header[key]
        if expected in ("ints", "shape"):
            bound = MAX_INTS if expected == "ints" else 4
            if not isinstance(value, list) or len(value) > bound:
                raise FrameError(f"{kind.name}.{key}: must be a list of at most {bound} integers")
            if not all(type(x) is int and 0 <= x < 2**53 for x in value):
                raise FrameError(f"{kind.name}.{key}: must hold integers in [0, 2^53)")
            continue
        if type(value) is not _CHECKS[expected]:
            # Its value may be nested too deeply, or be too long, to be shown.
            raise FrameError(f"{kind.name}.{key}: must be {expected}, not {type(value).__name__}")
        if isinstance(value, int) and not -(2**63) <= value < 2**64:
            raise FrameError(f"{kind.name}.{key}: must fit 64 bits")
        if isinstance(value, float) and not abs(value) < 1e30:  # also false for NaN
            raise FrameError(f"{kind.name}.{key}={value}: must be finite")
        if isinstance(value, str) and len(value) > _LONGEST.get(key, 200):
            raise FrameError(
                f"{kind.name}.{key} of {len(value)} characters: must be <= {_LONGEST.get(key, 200)}"
            )
        if isinstance(value, str) and not value.isascii() and _SURROGATE.search(value):
            raise FrameError(f"{kind.name}.{key}: must be text without lone surrogates")
