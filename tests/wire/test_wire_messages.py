"""Flower messages: offers and packed frames through real RecordDicts."""

from __future__ import annotations

import io
import struct
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.errors import FrameError, SessionError, WireError
from fedsplit.wire.messages import (
    FRAMES,
    OFFER,
    SessionOffer,
    pack_frames,
    read_array,
    unpack_frames,
    weights_record,
)

OFFERED = SessionOffer(
    run=2**64 - 1,
    node=2**63 + 5,
    round=3,
    mode="train",
    transport="stream",
    token="ab.12.cd",
    address="10.0.0.1:4000",
    ca=b"-----BEGIN CERTIFICATE-----\n",
    server_name="server.example",
    digest="0f" * 32,
    exchange=2,
)


def content(**changes: object) -> RecordDict:
    fields = {**OFFERED.to_record(), **changes}
    return RecordDict({OFFER: ConfigRecord({k: v for k, v in fields.items() if v is not None})})


def packed(data: bytes) -> RecordDict:
    array = Array(dtype="uint8", shape=(len(data),), stype=FRAMES, data=data)
    return RecordDict({FRAMES: ArrayRecord({"frames": array})})


def test_offer_round_trip():
    for offer in (OFFERED, replace(OFFERED, ca=b"", address="", run=0, exchange=0, mode="predict")):
        sent = RecordDict({OFFER: offer.to_record()})

        assert SessionOffer.from_content(sent) == offer


def test_no_offer():
    with pytest.raises(SessionError, match="announces no session"):
        SessionOffer.from_content(RecordDict())


@pytest.mark.parametrize("key", list(OFFERED.to_record()))
@pytest.mark.parametrize("value", [None, 1.5, True, [1], ["a"]])
def test_offers_with_missing_or_mistyped_fields(key: str, value: object):
    with pytest.raises(SessionError, match=f"offer {key}"):
        SessionOffer.from_content(content(**{key: value}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run", "-1"),
        ("run", "18446744073709551616"),
        ("run", "1" * 21),
        ("run", ""),
        ("run", "1.0"),
        ("node", "²"),
        ("node", 5),
        ("round", -1),
        ("exchange", -1),
        ("mode", "other"),
        ("mode", "../../x"),
        ("transport", "loopback"),
        ("token", "x" * 257),
        ("address", "x" * 301),
        ("digest", "x" * 101),
        ("ca", "text"),
        ("ca", b"x" * ((1 << 16) + 1)),
    ],
)
def test_offers_out_of_bounds(key: str, value: object):
    with pytest.raises(SessionError, match=f"offer {key}"):
        SessionOffer.from_content(content(**{key: value}))


@settings(deadline=None)
@given(st.lists(st.binary(max_size=50), max_size=10))
def test_packed_frames_round_trip(frames: list[bytes]):
    sent = RecordDict({FRAMES: pack_frames(frames)})

    assert unpack_frames(sent, 50) == frames


@settings(deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=20), min_size=1, max_size=5), st.data())
def test_truncated_messages(frames: list[bytes], data: st.DataObject):
    whole = pack_frames(frames)["frames"].data
    ends = {0} | {sum(4 + len(f) for f in frames[: i + 1]) for i in range(len(frames))}
    cut = data.draw(st.integers(0, len(whole)))

    if cut in ends:
        assert unpack_frames(packed(whole[:cut]), 50) == frames[: sorted(ends).index(cut)]
    else:
        with pytest.raises(FrameError):
            unpack_frames(packed(whole[:cut]), 50)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\1", "inside a frame's length"),
        (struct.pack("<I", 5) + b"1234", "frame of 5 bytes"),
        (struct.pack("<I", 2**32 - 1), "frame of 4294967295 bytes"),
        (struct.pack("<I", 11) + b"x" * 11, "frame of 11 bytes: must be <= 10"),
        (bytes(4) * 21, "over 20 frames"),
    ],
)
def test_bad_messages(data: bytes, message: str):
    with pytest.raises(FrameError, match=message):
        unpack_frames(packed(data), 10, max_frames=20)


def test_messages_without_frames():
    for empty in (RecordDict(), RecordDict({FRAMES: ArrayRecord()})):
        with pytest.raises(FrameError, match="no frames"):
            unpack_frames(empty, 10)


def test_weights_record():
    state = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}

    record = weights_record(state)

    assert np.array_equal(record["a.weight"].numpy(), state["a.weight"])


def _file(save: object, *values: object) -> bytes:
    found = io.BytesIO()
    save(found, *values)  # type: ignore[operator]
    return found.getvalue()


def _header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + 1) + text.encode() + b"\n"


def _huge() -> str:
    return str({"descr": "<f4", "fortran_order": False, "shape": (10**6, 10**6, 100)})


ODD_BYTES = {
    "nothing": b"",
    "an archive": _file(np.savez, np.zeros((2, 3), np.float32)),
    "a broken archive": b"PK\x03\x04junk",
    "a header of too many numbers": _header(_huge()),
    "a header without end": _header("(" * 9000),
    "too few numbers": _file(np.save, np.zeros((2, 3), np.float32))[:-1],
    **{
        f"{dtype} numbers": _file(np.save, np.ones((2, 3), dtype))
        for dtype in ("<f8", "c16", "i8", "?", "f2", ">f4", "U1", "M8[s]", "f4,f4")
    },
    "another shape": _file(np.save, np.ones((3, 2), np.float32)),
}


@pytest.mark.parametrize("case", ODD_BYTES)
def test_an_array_is_what_it_says_or_a_wire_error(case: str) -> None:
    odd = Array(dtype="float32", shape=(2, 3), stype="numpy.ndarray", data=ODD_BYTES[case])

    with pytest.raises(WireError, match=r"must be float32 \(2, 3\)"):
        read_array(odd, "float32", (2, 3))


def test_an_array_that_is_as_it_says_is_read() -> None:
    value = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    found = read_array(Array(value), "float32", (2, 3))

    np.testing.assert_array_equal(found, value)
    found += 1.0  # a copy of its own
    with pytest.raises(WireError, match=r"float32 \(2, 3\): must be float32 \(3, 2\)"):
        read_array(Array(value), "float32", (3, 2))
