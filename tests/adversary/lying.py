"""A server that lies, and one owner as it meets it: the owner's real code, home, policy and data.

Nothing of the owner's is replaced: a message goes through the ClientApp's own dispatch, and a
session runs on a real stream over the loopback interface.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import torch
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

import fedsplit
from fedsplit.client import answer
from fedsplit.config import RunConfig
from fedsplit.errors import WireError
from fedsplit.models.bundle.bottom import Bundle
from fedsplit.owners.naming import HOME_VARIABLE, POLICY_VARIABLE, SIMULATION_VARIABLE
from fedsplit.wire.codecs import decode_rows, encode_rows
from fedsplit.wire.frames import Frame, Kind
from fedsplit.wire.link import Link
from fedsplit.wire.messages import OFFER, REPORT, WEIGHTS, SessionOffer
from fedsplit.wire.transfer import send_files

NODE = 17
WAIT_S = 300.0
MAX_FRAME = 64 << 20
RUNS = itertools.count(1)
Answer = Callable[[list[int]], Tensor]
"""Slots of a step -> what the server says of them."""


@dataclass
class Owner:
    """An owner with texts, labels, a policy and a noise secret.

    Attributes:
        folder: holds its home and its data.
        texts: its own.
        labels: one per text.
        policy: TOML of its owner.toml; empty: it has none.
    """

    folder: Path
    texts: Sequence[str]
    labels: Sequence[int]
    policy: str = ""

    def __post_init__(self) -> None:
        self.home.mkdir(parents=True, mode=0o700)
        self._write("noise.secret", bytes(range(32)))
        if self.policy:
            self._write("owner.toml", self.policy.encode())
        rows = [
            json.dumps({"text": t, "label": y})
            for t, y in zip(self.texts, self.labels, strict=True)
        ]
        (self.folder / "data.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def node_config(self) -> dict[str, Any]:
        return {
            "owner": "victim",
            "state-dir": str(self.home),
            "data-path": str(self.folder / "data.jsonl"),
            "ledger-sync": 64,
        }

    def ask(self, kind: str, content: RecordDict, run: int, flat: Mapping[str, Any]) -> Message:
        """Hand the owner's app one message and return its reply."""
        TaskIdentity.run_id = run  # Flower sets them where it starts an app's process
        TaskIdentity.node_id = TaskIdentity.task_id = 1
        message = Message(content, dst_node_id=NODE, message_type=kind)
        with _no_simulation():
            return answer(message, Context(run, NODE, self.node_config, RecordDict(), dict(flat)))

    def ledger(self) -> list[dict[str, Any]]:
        """Return every line of its ledger."""
        return [json.loads(x) for x in (self.home / "ledger.jsonl").read_text().splitlines()]

    def _write(self, name: str, content: bytes) -> None:
        (self.home / name).write_bytes(content)
        (self.home / name).chmod(0o600)


@contextmanager
def _no_simulation() -> Iterator[None]:
    names = (SIMULATION_VARIABLE, HOME_VARIABLE, POLICY_VARIABLE)
    before = {name: os.environ.pop(name, None) for name in names}
    try:
        yield
    finally:
        os.environ.update({name: value for name, value in before.items() if value is not None})


@dataclass
class Taken:
    """What one message brought the server."""

    frames: list[Frame] = field(default_factory=list)
    refusal: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)

    @property
    def told(self) -> list[str]:
        """Every error text that the owner told."""
        found = [f"{f['error']}: {f['message']}" for f in self.frames if f.kind is Kind.ERROR]
        return [*found, self.refusal] if self.refusal else found

    @property
    def slots(self) -> dict[int, list[int]]:
        return {f["step"]: list(f["slots"]) for f in self.frames if f.kind is Kind.BATCH}

    @property
    def gradients(self) -> dict[int, Tensor]:
        """Step -> rows."""
        return {
            f["step"]: decode_rows(f.body, tuple(f["shape"]), f["codec"])
            for f in self.frames
            if f.kind is Kind.GRAD
        }


def settings(**changes: Any) -> dict[str, Any]:
    """Return a run config, flat: ``group__key=value``, underscores for dashes."""
    flat: dict[str, Any] = dict(RunConfig().to_flat())
    flat |= {
        "session.codec": "fp32",
        "session.reconnect-s": 0.0,
        "model.name": "tiny",
        "model.labels": 2,
        "model.max-tokens": 40,  # the tiny model's positions
        "train.rounds": 1,
        "train.batch-size": 8,
    }
    for name, value in changes.items():
        key = name.replace("__", ".").replace("_", "-")
        assert key in flat, key
        flat[key] = value
    return flat


class LyingServer:
    """Listens on the loopback interface and answers one session after the other."""

    def __init__(self) -> None:
        self._play: Callable[[Link, Taken], None] = lambda link, taken: None
        self._taken = Taken()
        self._server = grpc.server(ThreadPoolExecutor(4))
        handler = grpc.stream_stream_rpc_method_handler(self._open)
        generic = grpc.method_handlers_generic_handler("fedsplit.Session", {"Open": handler})
        self._server.add_generic_rpc_handlers((generic,))
        self._port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def stop(self) -> None:
        self._server.stop(0)

    def split(
        self,
        owner: Owner,
        flat: Mapping[str, Any],
        bundle: Bundle,
        says: Answer,
        kind: str = "train",
        **offered: Any,
    ) -> Taken:
        """Ask for a split session, and answer its steps with whatever ``says`` returns."""

        def play(link: Link, taken: Taken) -> None:
            def recv() -> Frame:
                frame = link.recv(WAIT_S)
                kept = Frame(frame.kind, frame.header, bytes(frame.body), frame.sequence)
                taken.frames.append(kept)
                return kept

            hello = recv()
            link.send(Kind.WELCOME, _welcome(hello))
            frame = recv()
            if frame.kind is Kind.NEED:
                send_files(link, bundle.files)
                frame = recv()
            link.send(Kind.START, {"window": 1}, b"")
            while (frame := recv()).kind is not Kind.DONE:
                if frame.kind is Kind.BATCH:
                    values = says(list(frame["slots"]))
                    header = {"step": frame["step"], "codec": "fp32", "shape": list(values.shape)}
                    link.send(Kind.LOGITS, header, encode_rows(values, "fp32"))
            link.send(Kind.BYE, {"reason": "done"})

        self._play = play
        return self.message(owner, flat, kind, digest=bundle.digest, **offered)

    def emulator(
        self,
        owner: Owner,
        flat: Mapping[str, Any],
        files: Mapping[str, bytes],
        digest: str,
        **o: Any,
    ) -> Taken:
        """Ask for a session of offsite tuning on an emulator's files."""

        def play(link: Link, taken: Taken) -> None:
            hello = link.recv(WAIT_S)
            link.send(Kind.WELCOME, _welcome(hello))
            link.recv(WAIT_S)  # NEED
            send_files(link, dict(files))
            link.send(Kind.BYE, {"reason": "done"})

        self._play = play
        return self.message(owner, flat, o.pop("kind", "train"), digest=digest, **o)

    def message(
        self, owner: Owner, flat: Mapping[str, Any], kind: str, run: int = 0, **offered: Any
    ) -> Taken:
        """Send one message with an offer, whose fields may lie, and return what came."""
        number = run or next(RUNS)
        fields: dict[str, Any] = {
            "run": number,
            "node": NODE,
            "round": 1,
            "mode": "evaluate" if kind.startswith("evaluate") else "train",
            "transport": "stream",
            "token": "token",
            "address": f"127.0.0.1:{self._port}",
        }
        offer = SessionOffer(**{**fields, **offered})
        self._taken = taken = Taken()
        reply = owner.ask(kind, RecordDict({OFFER: offer.to_record()}), number, flat)
        if reply.has_error():
            taken.refusal = str(reply.error.reason)
            return taken
        record = reply.content.metric_records.get(REPORT)
        taken.metrics = {k: float(v) for k, v in (record or {}).items()}
        arrays = reply.content.array_records.get(WEIGHTS) or {}
        taken.weights = {n: torch.from_numpy(a.numpy().copy()) for n, a in arrays.items()}
        return taken

    def _open(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        link, taken = Link(MAX_FRAME), self._taken

        def read() -> None:
            try:
                for data in requests:
                    link.put(link.incoming, data)
            except Exception:  # the owner's stream broke; its frames so far stand
                pass
            link.close("peer closed the stream")

        def play() -> None:
            try:
                self._play(link, taken)
            except (WireError, KeyError, AssertionError):
                pass  # the owner gave up
            finally:
                link.close("done")

        for target in (read, play):
            threading.Thread(target=target, daemon=True).start()
        while (data := link.take()) is not None:
            yield data


def _welcome(hello: Frame) -> dict[str, Any]:
    return {
        "version": fedsplit.__version__,
        "digest": hello["digest"],
        "codec": "fp32",
        "logits_codec": "fp32",
    }


def nearest_class(sent: Tensor, logits: Tensor) -> list[int]:
    """Read labels from gradients of a mean loss by known logits, as any server can."""
    residual = sent * len(sent) - torch.softmax(logits, 1)
    return [int(x) for x in residual.argmin(1)]
