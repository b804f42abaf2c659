"""Fuzz cases for what crosses the wire: frames, codecs, sessions, offers, replies, settings."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedsplit.config import RunConfig
from fedsplit.errors import FrameError
from fedsplit.owners.handshake import hello
from fedsplit.wire.authentication import Hello, SessionAuthenticator
from fedsplit.wire.codecs import CODECS, decode_rows, encode_rows
from fedsplit.wire.frames import Frame, Kind, decode, encode
from fedsplit.wire.fuzz import damaged, sample_frames, sample_header
from fedsplit.wire.link import loopback
from fedsplit.wire.messages import (
    FRAMES,
    OFFER,
    REPORT,
    WHO,
    SessionOffer,
    pack_frames,
    unpack_frames,
)
from fedsplit.wire.reconnection import ReplayBuffer, SessionTickets
from fedsplit.wire.replies import reply_schema
from fedsplit.wire.serving import SERVING, ServingOffer
from fedsplit.wire.tokens import TokenBook
from fedsplit.wire.transfer import receive_files
from simulations.fuzz.cases import Case, Cases, cases_of
from simulations.fuzz.damage import damaged_text, damaged_value, flipped
from strategies.sessions.owner_session import OwnerSession
from strategies.sessions.representation_cache import RepresentationCache

BOUND = 1 << 20


def frames(_: Path) -> Cases:
    """Fuzz frames; what is accepted must encode to itself again."""
    known = sample_frames(random.Random(0))

    def parse(data: bytes) -> None:
        frame = decode(data, BOUND)
        if decode(encode(frame, frame.sequence, 2 * BOUND), 2 * BOUND) != frame:
            raise AssertionError("accepted, but not the same when encoded again")

    return cases_of(lambda rng: damaged(rng.choice(known), rng), parse)


def codecs(_: Path) -> Cases:
    """Fuzz tensor bodies under every codec, with a shape that may not be theirs."""
    rows = torch.linspace(-3, 3, 60).reshape(5, 12)
    bodies = {name: encode_rows(rows, name) for name in CODECS}

    def draw(rng: random.Random) -> Case:
        name = rng.choice(list(bodies))
        body = rng.choice((bodies[name], flipped(bodies[name], rng), rng.randbytes(240)))
        shape = rng.choice(
            ((5, 12), (60,), (1, 5, 12), (0, 12), (), (-5, -12), (2**31, 2**31), (2**62, 0))
        )
        codec = rng.choice((name, *CODECS, "zip", ""))

        def case() -> None:
            found = decode_rows(body, shape, codec)
            if not bool(found.isfinite().all()) or tuple(found.shape) != shape:
                raise AssertionError(f"{tuple(found.shape)} for {shape}, or not finite")

        return case

    return draw


def transfers(_: Path) -> Cases:
    """Fuzz files in slices over a session, with headers that lie."""

    def draw(rng: random.Random) -> Case:
        left, right = loopback(BOUND)
        pieces = [("a", b"x" * 30), ("b", b""), ("b", b"y")]
        for index, (name, body) in enumerate(pieces):
            header = {"name": name, "offset": 0, "size": len(body), "last": index == 2}
            if rng.random() < 0.4:
                change: dict[str, Any] = {
                    "name": rng.choice(("a", "b", "../../x", "", "\x00")),
                    "offset": rng.choice((0, 1, 30, 2**63)),
                    "size": rng.choice((0, 1, 2**40, 2**63, -1)),
                    "last": rng.random() < 0.5,
                }
                key = rng.choice(list(change))
                header[key] = change[key]
            left.send(Kind.FILE, header, body)
        left.close()

        def case() -> None:
            if sum(map(len, receive_files(right, 0.5, 1 << 20).values())) > 1 << 20:
                raise AssertionError("more than the bound")

        return case

    return draw


def hellos(_: Path) -> Cases:
    """Fuzz HELLO frames and tokens; what is admitted was issued, and only once."""
    authenticator = SessionAuthenticator(7, TokenBook(clock=lambda: 1e9))

    def draw(rng: random.Random) -> Case:
        token = authenticator.tokens.issue(7, 5, 1, "train")
        sound = hello(SessionOffer(7, 5, 1, "train", "stream", token), "a")
        header: dict[str, Any] = dict(sound)
        for _ in range(rng.randrange(1, 3)):
            key = rng.choice(list(header))
            header[key] = rng.choice((sample_header(Kind.HELLO, rng)[key], sound[key]))
        parts = token.split(".")
        if rng.random() < 0.5:
            at = rng.randrange(3)
            parts[at] = rng.choice(("", "9" * 5000, "\u0661", parts[at][:-1], parts[at].upper()))
            header["token"] = ".".join(parts)[:256]

        def case() -> None:
            frame = decode(encode(Frame(Kind.HELLO, header), 0, BOUND), BOUND)
            admitted = authenticator.admit(frame)
            if admitted.run != 7 or frame["token"] != token or admitted.node != 5:
                raise AssertionError("admitted what was never issued")

        return case

    return draw


def tickets(_: Path) -> Cases:
    """Fuzz tickets by which a cut session goes on, and what the peer says has reached it."""

    def draw(rng: random.Random) -> Case:
        left, right = loopback(BOUND)
        tickets = SessionTickets(ReplayBuffer(left, 3))
        for step in range(4):
            left.send(Kind.DONE, {"samples": step, "steps": step})
        sound = tickets.ticket
        ticket = rng.choice((sound, "", damaged_text(sound, rng), sound[:-1], "x" * 9999))
        received = rng.choice((0, 1, 4, 5, -1, 2**63, 10**17))

        def case() -> None:
            tickets.redeem(ticket)
            # What stands before the point only finds the tickets.
            if ticket.partition(".")[2] != sound.partition(".")[2]:
                raise AssertionError("took a ticket that was never given")
            tickets.replay.attach(received)
            right.close()

        return case

    return draw


def offers(_: Path) -> Cases:
    """Fuzz session offers as an owner reads them."""
    sound = SessionOffer(7, 5, 1, "train", "stream", "t.1.m", "127.0.0.1:1", b"pem", "n", "ab")
    return _records(OFFER, dict(sound.to_record()), SessionOffer.from_content)


def serving_offers(_: Path) -> Cases:
    """Fuzz offers of a model that serves."""
    session = SessionOffer(7, 5, 0, "predict", "stream", "", "127.0.0.1:1", b"", "", "ab")
    content = ServingOffer(session, ("a.1.b", "c.2.d")).to_content()
    tokens = content.config_records[SERVING]

    def parse(given: RecordDict) -> ServingOffer:
        given[SERVING] = tokens
        return ServingOffer.from_content(given)

    first = _records(OFFER, dict(session.to_record()), parse)

    def draw(rng: random.Random) -> Case:
        if rng.random() < 0.5:
            return first(rng)
        lists: tuple[Any, ...] = ([], ["x"] * 2000, [1], [1.5], [""], [b""], ["x" * 9999])
        value = rng.choice((*lists, damaged_value("", rng)))
        given = RecordDict({OFFER: session.to_record()})
        given[SERVING] = _record({"tokens": value})
        return lambda: ServingOffer.from_content(given)

    return draw


def replies(_: Path) -> Cases:
    """Fuzz owners' reports as the server reads them."""
    schema = reply_schema("offsite-tuning", "evaluate")
    metrics = {"num-examples": 3, "loss": 0.5, "targets": 3.0}

    def draw(rng: random.Random) -> RecordDict:
        content = schema.write(metrics, "a")
        numbers: dict[str, Any] = dict(metrics)
        for _ in range(rng.randrange(3)):
            names = (*numbers, "", "x" * 9999, "\u202e")
            odd: tuple[Any, ...] = (0, 2**63 - 1, float("nan"), float("inf"), -1.0)
            odd += ([1.0] * 50, [], 1e300)
            numbers[rng.choice(names)] = rng.choice(odd)
        with contextlib.suppress(TypeError, ValueError):
            content[REPORT] = MetricRecord(numbers)
        if rng.random() < 0.5:
            content[WHO] = _record({"owner": damaged_value("owner-1", rng), "schema": schema.name})
        if rng.random() < 0.1:
            del content[rng.choice((REPORT, WHO))]
        return content

    return cases_of(draw, schema.read)


def packed_frames(_: Path) -> Cases:
    """Fuzz frames in a Flower message (messages transport)."""
    known = [encode(f, 0, BOUND) for f in sample_frames(random.Random(0), 2)]
    sound = pack_frames(known[:8])["frames"].data

    def draw(rng: random.Random) -> RecordDict:
        data = flipped(sound, rng)
        array = Array(dtype="uint8", shape=(len(data),), stype=FRAMES, data=data)
        return RecordDict({FRAMES: ArrayRecord({rng.choice(("frames", "frames", "x")): array})})

    def parse(content: RecordDict) -> None:
        for each in unpack_frames(content, BOUND):
            with contextlib.suppress(FrameError):
                decode(each, BOUND)

    return cases_of(draw, parse)


def settings(_: Path) -> Cases:
    """Fuzz the run's settings, which the other party writes."""
    sound = RunConfig().to_flat()

    def draw(rng: random.Random) -> dict[str, Any]:
        flat: dict[str, Any] = dict(sound) if rng.random() < 0.5 else {}
        for _ in range(rng.randrange(1, 4)):
            key = rng.choice((*sound, "x", "x.y", "train.", ".", "data.path.x", "__class__.x"))
            flat[key] = damaged_value(sound.get(key, ""), rng)
        return flat

    return cases_of(draw, lambda flat: RunConfig.from_flat(RunConfig.from_flat(flat).to_flat()))


def owner_sessions(_: Path) -> Cases:
    """Fuzz an owner's frames in a session of training, as the server takes them."""
    rows = encode_rows(torch.ones(6, 4), "fp32")
    batch: dict[str, Any] = {
        "step": 0,
        "slots": [0, 1],
        "fresh": [0, 1],
        "lengths": [2, 4],
        "codec": "fp32",
        "dim": 4,
        "last": False,
    }
    ready: dict[str, Any] = {"batches": 2, "samples": 5, "mechanism": ""}
    grad: dict[str, Any] = {"step": 0, "codec": "fp32", "shape": [2, 3], "weight": 2.0}
    config = RunConfig.from_flat(
        {"model.max-tokens": 64, "session.codec": "fp32", "session.deadline-s": 0.02}
    )

    def lie(sound: dict[str, Any], rng: random.Random) -> dict[str, Any]:
        header = dict(sound)
        for _ in range(rng.randrange(1, 3)):
            key = rng.choice(list(header))
            value = header[key]
            if isinstance(value, list):
                odd: tuple[Any, ...] = ([], value * 2, value[::-1], [2**52], value * 1000, [0, 0])
                header[key] = rng.choice((*odd, value[:1]))
            elif isinstance(value, str):
                header[key] = rng.choice(("bf16", "int8", "zip", ""))
            elif isinstance(value, bool):
                header[key] = not value
            else:
                header[key] = type(value)(rng.choice((0, 1, -1, 3, 2**40)))
        return header

    def draw(rng: random.Random) -> Case:
        ours, theirs = loopback(BOUND)
        session = OwnerSession(
            ours,
            Hello(7, 5, 1, "train", "a", ""),
            RepresentationCache(),
            config,
            width=4,
            joint=rng.random() < 0.5,
        )
        body = rows if rng.random() < 0.7 else flipped(rows, rng)
        wide = encode_rows(torch.ones(2, 3), "fp32")
        for kind, sound, content, share in (
            (Kind.READY, ready, b"", 0.2),
            (Kind.BATCH, batch, body, 0.7),
            (Kind.GRAD, grad, wide, 0.7),
        ):
            with contextlib.suppress(FrameError):  # what breaks the schema is the frames' turn
                theirs.send(kind, lie(sound, rng) if rng.random() < share else sound, content)

        def case() -> None:
            session.handshake({"a": b""}, "ab")
            session.start(2)
            found = session.batch()
            if any(not bool(row.isfinite().all()) for row in found.rows):
                raise AssertionError("took rows that are not finite")
            session.gradient(found, (2, 3))

        return case

    return draw


def _record(values: dict[str, Any]) -> ConfigRecord:
    """Return a record of those values that Flower's own types can carry."""
    record = ConfigRecord()
    for key, value in values.items():
        with contextlib.suppress(TypeError, ValueError):
            record[key] = value
    return record


def _records(name: str, sound: dict[str, Any], parse: Callable[[RecordDict], Any]) -> Cases:
    def draw(rng: random.Random) -> RecordDict:
        values = dict(sound)
        for _ in range(rng.randrange(1, 3)):
            key = rng.choice(list(values))
            if rng.random() < 0.2:
                del values[key]
                break
            values[key] = damaged_value(values[key], rng)
        return RecordDict({name: _record(values)} if rng.random() < 0.98 else {})

    return cases_of(draw, lambda content: dataclasses.asdict(parse(content)))
