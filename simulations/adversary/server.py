"""A session server that follows a script, and keeps everything that crosses in both directions."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Self

import grpc
import torch
from flwr.app import Message, RecordDict
from torch import Tensor

from fedsplit.config import RunConfig
from fedsplit.errors import WireError
from fedsplit.models.bundle.bottom import Bundle
from fedsplit.wire.codecs import decode_rows, encode_rows
from fedsplit.wire.dial import channel_options
from fedsplit.wire.frames import SCHEMA, Frame, Kind
from fedsplit.wire.link import Link
from fedsplit.wire.messages import OFFER, WEIGHTS, SessionOffer
from fedsplit.wire.secure_sum import MASKED
from fedsplit.wire.transfer import send_files
from simulations.adversary.victim import NODE, Victim

MAX_FRAME = 64 << 20
REPORT = "fedsplit.report"
DIGEST = next(key for key in ("digest", "bottom") if key in SCHEMA[Kind.WELCOME])
WAIT_S = 300.0
RUNS = itertools.count(1)


@dataclass
class Taken:
    """What one message brought the server.

    Attributes:
        up: frames that the owner sent.
        down: frames that the server sent.
        refusal: the owner's error reply; empty where it answered.
        metrics: of its report.
        weights: tensors of its reply.
        masked: numbers under masks of its reply, (d,).
        size: bytes of all frames' bodies and headers that left, without a reply's arrays.
    """

    up: list[Frame] = field(default_factory=list)
    down: list[Frame] = field(default_factory=list)
    refusal: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    masked: Any = None
    size: int = 0

    @property
    def told(self) -> list[str]:
        """Return every error text that the owner told the server."""
        frames = [f"{f['error']}: {f['message']}" for f in self.up if f.kind is Kind.ERROR]
        return [*frames, self.refusal] if self.refusal else frames

    @property
    def rows(self) -> dict[int, Tensor]:
        """Return the received representations, slot -> (T, d)."""
        found: dict[int, Tensor] = {}
        for frame in self.up:
            if frame.kind is not Kind.BATCH or not frame["fresh"]:
                continue
            lengths = list(frame["lengths"])
            whole = decode_rows(frame.body, (sum(lengths), frame["dim"]), frame["codec"])
            found.update(zip(frame["fresh"], torch.split(whole, lengths), strict=True))
        return found

    @property
    def slots(self) -> dict[int, list[int]]:
        """Return the slots of each step."""
        return {f["step"]: list(f["slots"]) for f in self.up if f.kind is Kind.BATCH}

    @property
    def gradients(self) -> dict[int, Tensor]:
        """Return the received gradients, step -> rows."""
        return {
            f["step"]: decode_rows(f.body, tuple(f["shape"]), f["codec"])
            for f in self.up
            if f.kind is Kind.GRAD
        }


class Peer:
    """The server's end of one session."""

    def __init__(self, link: Link, taken: Taken) -> None:
        self.link = link
        self.taken = taken

    def recv(self) -> Frame:
        """Return the owner's next frame, kept whole.

        Raises:
            WireError: it gave up, or nothing came.
        """
        frame = self.link.recv(WAIT_S)
        kept = Frame(frame.kind, frame.header, bytes(frame.body), frame.sequence)
        self.taken.up.append(kept)
        self.taken.size += len(kept.body)
        return kept

    def send(self, kind: Kind, header: Mapping[str, Any], body: bytes = b"") -> None:
        """Send one frame."""
        self.taken.down.append(Frame(kind, dict(header), body))
        self.link.send(kind, header, body)


Script = Callable[[Peer], None]


@dataclass(frozen=True)
class Step:
    """One step, as the script that answers it sees it.

    Attributes:
        number: of the session, from 0.
        slots: the step's samples.
        lengths: tokens of each.
    """

    number: int
    slots: list[int]
    lengths: list[int]


Answer = Callable[[Step], Tensor]


def zeros(classes: int) -> Answer:
    """Return logits of no opinion: (samples, classes)."""
    return lambda step: torch.zeros(len(step.slots), classes)


def token_zeros(width: int) -> Answer:
    """Return the same for a language model, or as hidden states: (tokens, width)."""
    return lambda step: torch.zeros(sum(step.lengths), width)


def split_script(
    bundle: Bundle | None,
    answer: Answer,
    *,
    held: Callable[[int], bytes] = lambda samples: b"",
    steps: int | None = None,
    reason: str = "done",
) -> Script:
    """Return the script of an ordinary split session with freely chosen contents.

    Args:
        bundle: sent when the owner asks for the bottom.
        answer: what each step is answered with: (rows, width), float.
        held: number of samples -> bitmap of those that the server says it holds.
        steps: answered before the server breaks off; None: all.
        reason: of the last frame.
    """

    def script(peer: Peer) -> None:
        _welcome(peer)
        frame = peer.recv()
        if frame.kind is Kind.NEED:
            assert bundle is not None
            send_files(peer.link, bundle.files)
            frame = peer.recv()
        samples = int(frame["samples"])
        peer.send(Kind.START, {"window": 1}, held(samples))
        lengths: dict[int, int] = {}
        while True:
            frame = peer.recv()
            if frame.kind is Kind.DONE:
                break
            if frame.kind is not Kind.BATCH:
                continue
            lengths.update(zip(frame["fresh"], frame["lengths"], strict=True))
            slots = list(frame["slots"])
            if steps is not None and frame["step"] >= steps:
                break
            values = answer(Step(frame["step"], slots, [lengths.get(s, 0) for s in slots]))
            header = {"step": frame["step"], "codec": "fp32", "shape": list(values.shape)}
            peer.send(Kind.LOGITS, header, encode_rows(values, "fp32"))
        peer.send(Kind.BYE, {"reason": reason})

    return script


def _welcome(peer: Peer) -> None:
    hello = peer.recv()
    told = {"version": hello["version"], DIGEST: hello[DIGEST]}
    peer.send(Kind.WELCOME, {**told, "codec": "fp32", "logits_codec": "fp32"})


def files_script(files: Mapping[str, bytes]) -> Script:
    """Return the script of a session that only brings files (an emulator's)."""

    def script(peer: Peer) -> None:
        _welcome(peer)
        peer.recv()  # NEED
        send_files(peer.link, files)
        peer.send(Kind.BYE, {"reason": "done"})

    return script


def settings(**changes: Any) -> dict[str, Any]:
    """Return a run config, flat, every key present.

    Args:
        **changes: ``group__key=value``, underscores for dashes.
    """
    flat: dict[str, Any] = dict(RunConfig().to_flat())
    flat |= {
        "session.codec": "fp32",
        "session.reconnect-s": 0.0,
        "session.deadline-s": WAIT_S,
        "session.idle-s": WAIT_S,
        "model.name": "tiny",
        "model.labels": 2,
        "privacy.row-clip": "auto",
        "train.rounds": 1,
    }
    for name, value in changes.items():
        key = name.replace("__", ".").replace("_", "-")
        if key not in flat:
            raise KeyError(key)
        flat[key] = value
    return flat


class LyingServer:
    """Listens on the loopback interface and runs one session after the other by script."""

    def __init__(self) -> None:
        self._script: Script = lambda peer: None
        self._taken = Taken()
        self._done = threading.Event()
        # An owner that measures is silent for long, and its pings are no abuse.
        self._server = grpc.server(ThreadPoolExecutor(8), options=channel_options(MAX_FRAME))
        handler = grpc.stream_stream_rpc_method_handler(self._open)
        generic = grpc.method_handlers_generic_handler("fedsplit.Session", {"Open": handler})
        self._server.add_generic_rpc_handlers((generic,))
        self._port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._server.stop(0.5)

    def session(
        self,
        victim: Victim,
        flat: Mapping[str, Any],
        script: Script,
        *,
        digest: str,
        kind: str = "train",
        run: int | None = None,
        **offered: Any,
    ) -> Taken:
        """Send one message and answer whatever session it opens.

        Args:
            victim: the owner.
            flat: the run config.
            script: of the session.
            digest: that the offer names.
            kind: Flower's message type.
            run: its number; None: a new one.
            **offered: fields of the offer that differ from an honest one's; ``mode`` is the
                message's own where it is not given.
        """
        number = next(RUNS) if run is None else run
        mode = offered.pop("mode", "evaluate" if kind.startswith("evaluate") else "train")
        content = self.offer(number, mode, digest=digest, **offered)
        return self.message(victim, flat, script, kind, content, number)

    def offer(self, run: int, mode: str, *, digest: str, **offered: Any) -> RecordDict:
        """Return a message's content that announces a session; see :meth:`session`."""
        fields: dict[str, Any] = {
            "run": run,
            "node": NODE,
            "round": 1,
            "mode": mode,
            "transport": "stream",
            "token": "token",
            "address": f"127.0.0.1:{self._port}",
            DIGEST: digest,
        }
        return RecordDict({OFFER: SessionOffer(**{**fields, **offered}).to_record()})

    def message(
        self,
        victim: Victim,
        flat: Mapping[str, Any],
        script: Script,
        kind: str,
        content: RecordDict,
        run: int,
    ) -> Taken:
        """Send a message with any content; see :meth:`session`."""
        self._script, self._taken = script, Taken()
        self._done.clear()
        opened = threading.Event()
        self._opened = opened
        reply = victim.ask(kind, content, run, flat)
        if opened.is_set():
            self._done.wait(WAIT_S)
        return _with_reply(self._taken, reply)

    def _open(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        link, script, taken, done = Link(MAX_FRAME), self._script, self._taken, self._done
        self._opened.set()

        def read() -> None:
            try:
                for data in requests:
                    link.put(link.incoming, data)
            except Exception:  # the owner's stream broke; its frames so far stand
                pass
            link.close("peer closed the stream")

        def play() -> None:
            try:
                script(Peer(link, taken))
            except (WireError, KeyError, AssertionError):
                pass  # the owner gave up, or sent what this script has no answer to
            finally:
                link.close("done")
                done.set()

        threading.Thread(target=read, daemon=True).start()
        threading.Thread(target=play, daemon=True).start()
        while (data := link.take()) is not None:
            yield data


def _with_reply(taken: Taken, reply: Message) -> Taken:
    """Add what the owner's reply carried."""
    if reply.has_error():
        taken.refusal = str(reply.error.reason)
        return taken
    record = reply.content.metric_records.get(REPORT)
    if record is not None:
        taken.metrics = {k: float(v) for k, v in record.items() if isinstance(v, int | float)}
    if (masked := reply.content.array_records.get(MASKED)) is not None:
        taken.masked = next(iter(masked.values())).numpy()
    arrays = reply.content.array_records.get(WEIGHTS)
    if arrays is not None:
        taken.weights = {n: torch.from_numpy(a.numpy().copy()) for n, a in arrays.items()}
    return taken
