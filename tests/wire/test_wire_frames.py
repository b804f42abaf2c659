"""Frames: what goes in comes out, and nothing but a FrameError comes of anything else."""

from __future__ import annotations

import json
import random
import struct
import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.errors import FrameError
from fedsplit.wire.frames import (
    MAX_HEADER_BYTES,
    MAX_INTS,
    PREFIX_BYTES,
    PROTOCOL,
    SCHEMA,
    Frame,
    Kind,
    decode,
    encode,
)
from fedsplit.wire.fuzz import fuzz, sample_header

BOUND = 1 << 16
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=100)
VALUES = {
    "int": st.integers(-(2**63), 2**64 - 1),
    "str": TEXT,
    "bool": st.booleans(),
    "float": st.floats(-1e29, 1e29),
    "ints": st.lists(st.integers(0, 2**53 - 1), max_size=30),
    "shape": st.lists(st.integers(0, 2**53 - 1), max_size=4),
}
START = {"window": 4}


def frames() -> st.SearchStrategy[Frame]:
    def of(kind: Kind) -> st.SearchStrategy[Frame]:
        header = st.fixed_dictionaries({key: VALUES[t] for key, t in SCHEMA[kind].items()})
        return st.builds(Frame, st.just(kind), header, st.binary(max_size=200))

    return st.sampled_from(list(Kind)).flatmap(of)


def raw(header: bytes, *, kind: int = Kind.START, body: bytes = b"", **given: int) -> bytes:
    """A frame whose prefix tells the truth unless told otherwise."""
    lengths = given.get("header_bytes", len(header)), given.get("body_bytes", len(body))
    magic = struct.pack("<4sBIIQ", b"FSP1", kind, 0, *lengths)
    return magic + header + body


@settings(deadline=None)
@given(frames(), st.integers(0, 2**32 - 1))
def test_round_trip(frame: Frame, sequence: int):
    data = encode(frame, sequence, BOUND)

    found = decode(data, len(data))

    assert (found.kind, found.header, found.sequence) == (frame.kind, frame.header, sequence)
    assert bytes(found.body) == frame.body


@pytest.mark.parametrize("kind", list(Kind))
def test_every_kind_needs_exactly_its_own_keys(kind: Kind):
    header = sample_header(kind, random.Random(0))

    assert decode(encode(Frame(kind, header), 0, BOUND), BOUND).header == header
    for key in header:
        fewer = {k: v for k, v in header.items() if k != key}
        with pytest.raises(FrameError, match="missing or foreign"):
            decode(raw(json.dumps(fewer).encode(), kind=kind), BOUND)
    with pytest.raises(FrameError, match="missing or foreign"):
        encode(Frame(kind, {**header, "extra": 1}), 0, BOUND)


def test_body_is_a_view_not_a_copy():
    data = encode(Frame(Kind.START, START, b"x" * 1000), 0, BOUND)

    body = decode(data, BOUND).body

    assert isinstance(body, memoryview)
    assert body.obj is data


@settings(deadline=None)
@given(frames(), st.data())
def test_truncated_and_extended_frames_are_refused(frame: Frame, data: st.DataObject):
    whole = encode(frame, 0, BOUND)
    cut = data.draw(st.integers(0, len(whole) - 1))

    for damaged in (whole[:cut], whole + b"\0"):
        with pytest.raises(FrameError):
            decode(damaged, BOUND)


def test_fuzz():
    start = time.thread_time()

    report = fuzz(100_000, seed=20)

    assert report.cases == 100_000
    assert 0 < report.accepted < 10_000  # damage that leaves a sound frame, as in its body
    assert len(report.refused) > 50
    assert time.thread_time() - start < 15


def test_fuzz_is_the_same_for_the_same_seed():
    first, second = fuzz(500, seed=1), fuzz(500, seed=1)

    assert (first.accepted, first.refused) == (second.accepted, second.refused)


@pytest.mark.parametrize(
    "text",
    [
        '{"window":NaN}',
        '{"window":Infinity}',
        '{"window":-Infinity}',
        '{"window":1e999}',
        '{"window":4.0}',
        '{"window":true}',
        '{"window":null}',
        '{"window":"4"}',
        '{"window":[4]}',
        '{"window":18446744073709551616}',
        '{"window":-9223372036854775809}',
        '{"window":' + "9" * 5000 + "}",
        '{"window":4,"window":4}',
        '{"window":4,"window":5}',
        '{"window":{"a":1,"a":1}}',
        '{"window":4,"extra":4}',
        '{"Window":4}',
        "{}",
        "[]",
        "4",
        "",
        "{",
        '{"window":4} ,',
        '\ufeff{"window":4}',
        "[" * 60_000,
        '{"window":' + "[" * 900 + "]" * 900 + "}",
        '{"window":' * 10_000,
    ],
    ids=lambda text: text[:24],
)
def test_bad_headers_are_refused(text: str):
    with pytest.raises(FrameError) as caught:
        decode(raw(text.encode()), 1 << 20)

    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "1e30", "1", "true"])
def test_bad_floats_are_refused(number: str):
    text = f'{{"step":0,"codec":"fp32","shape":[1],"weight":{number}}}'

    with pytest.raises(FrameError):
        decode(raw(text.encode(), kind=Kind.GRAD), BOUND)


@pytest.mark.parametrize("slots", ["[true]", "[1.0]", "[-1]", "[9007199254740992]", "[[]]", "{}"])
def test_bad_lists_are_refused(slots: str):
    text = (
        f'{{"step":0,"slots":{slots},"fresh":[],"lengths":[],"codec":"fp32","dim":1,"last":false}}'
    )

    with pytest.raises(FrameError, match=r"BATCH\.slots"):
        decode(raw(text.encode(), kind=Kind.BATCH), BOUND)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "utf-8-sig"])
def test_headers_are_utf8_only(encoding: str):
    with pytest.raises(FrameError):
        decode(raw('{"window":4}'.encode(encoding)), BOUND)


def test_lone_surrogates_are_refused_both_ways():
    with pytest.raises(FrameError, match="surrogates"):
        decode(raw(b'{"reason":"\\ud800"}', kind=Kind.BYE), BOUND)
    with pytest.raises(FrameError, match="surrogates"):
        encode(Frame(Kind.BYE, {"reason": "\ud800"}), 0, BOUND)

    assert (
        decode(raw(b'{"reason":"\\ud83d\\ude00"}', kind=Kind.BYE), BOUND)["reason"] == "\U0001f600"
    )


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"FSP1",
        raw(b'{"window":4}')[: PREFIX_BYTES - 1],
        b"FSP2" + raw(b'{"window":4}')[4:],
        raw(b'{"window":4}', kind=0),
        raw(b'{"window":4}', kind=14),
        raw(b'{"window":4}', kind=255),
        raw(b'{"window":4}', header_bytes=2**32 - 1),
        raw(b'{"window":4}', body_bytes=2**64 - 1),
        raw(b'{"window":4}', header_bytes=0, body_bytes=13),
        raw(b'{"window":4}', header_bytes=13),
    ],
)
def test_bad_prefixes_are_refused(data: bytes):
    with pytest.raises(FrameError):
        decode(data, BOUND)


def test_bounds_hold_both_ways():
    data = encode(Frame(Kind.START, START, b"x" * 100), 0, BOUND)

    with pytest.raises(FrameError, match=f"must be <= {len(data) - 1}"):
        encode(Frame(Kind.START, START, b"x" * 100), 0, len(data) - 1)
    with pytest.raises(FrameError, match=f"must be <= {len(data) - 1}"):
        decode(data, len(data) - 1)
    with pytest.raises(FrameError, match="sequence"):
        encode(Frame(Kind.START, START), 2**32, BOUND)


def test_what_the_receiver_would_refuse_is_not_sent():
    """A header of allowed lists can still be longer than a header may be."""
    many = [2**53 - 1] * MAX_INTS
    header = {"step": 0, "slots": many, "fresh": [], "lengths": [], "codec": "", "dim": 0}

    with pytest.raises(FrameError, match=f"must be <= {MAX_HEADER_BYTES}"):
        encode(Frame(Kind.BATCH, {**header, "last": True}), 0, 1 << 30)


def test_strings_are_bounded():
    with pytest.raises(FrameError, match=r"BYE.reason of 501 characters: must be <= 500"):
        encode(Frame(Kind.BYE, {"reason": "x" * 501}), 0, BOUND)


@pytest.mark.parametrize("filler", ["[],", "{},", "[[[]]],", '"a",', "1,"])
def test_a_hostile_header_costs_little_memory_and_time(filler: str):
    """Worst ratio of parsed objects to text: still far below one frame's bound."""
    inner = (filler * (MAX_HEADER_BYTES // len(filler)))[: MAX_HEADER_BYTES - 64].rsplit(",", 1)[0]
    data = raw(b'{"slots":[' + inner.encode() + b"]}", kind=Kind.BATCH)
    tracemalloc.start()
    start = time.thread_time()

    with pytest.raises(FrameError):
        decode(data, 64 << 20)

    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20
    assert time.thread_time() - start < 3


def test_announced_lengths_allocate_nothing():
    data = raw(b'{"window":4}', body_bytes=2**62)
    tracemalloc.start()

    with pytest.raises(FrameError):
        decode(data, 64 << 20)

    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 16


def test_a_peer_of_an_older_protocol_is_told_so():
    with pytest.raises(FrameError, match=rf"session protocol 1: must be {PROTOCOL}"):
        decode(raw(b'{"protocol":1,"bottom":"ab"}', kind=Kind.HELLO), BOUND)
