"""One connected owner, from the server's side of its session."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import fedsplit
from fedsplit.config import RunConfig
from fedsplit.errors import FrameError, SessionError
from fedsplit.wire.authentication import Hello
from fedsplit.wire.codecs import decode_rows, encode_rows
from fedsplit.wire.frames import Frame, Kind
from fedsplit.wire.link import Link
from fedsplit.wire.transfer import send_files

from .representation_cache import RepresentationCache

MAX_SLOTS = 1 << 24


@dataclass
class Batch:
    """One step of one owner: its slots and their representations, one (T_i, d) tensor each."""

    step: int
    slots: list[int]
    rows: list[Tensor]
    last: bool

    @property
    def lengths(self) -> list[int]:
        """Tokens per sample."""
        return [int(r.shape[0]) for r in self.rows]


PATIENCE = 3
"""Deadlines that an owner's first frame may take: before it, it may measure its protection."""


def welcome_header(digest: str, codec: str, logits_codec: str) -> dict[str, str]:
    """Return the header of the server's first frame."""
    return {
        "version": fedsplit.__version__,
        "digest": digest,
        "codec": codec,
        "logits_codec": logits_codec,
    }


class OwnerSession:
    """Receives an owner's batches and gradients, checks them, and answers.

    Every problem raises an error that concerns this owner alone.

    Args:
        link: the owner's session.
        hello: who it is.
        cache: where frozen representations are kept.
        config: the run's settings: codecs, bounds and deadlines.
        width: expected d of representations.
        joint: whether representations change with every step (then nothing is kept).
        first: step that this session begins with; those before were taken in an earlier one.
        batch_size: samples of a batch at most, and what a number of samples makes of steps; 0: no
            bound.
    """

    def __init__(
        self,
        link: Link,
        hello: Hello,
        cache: RepresentationCache,
        config: RunConfig,
        *,
        width: int,
        joint: bool,
        first: int = 0,
        batch_size: int = 0,
    ) -> None:
        self._batch_size = batch_size
        self._train = config.train
        self.link = link
        self.hello = hello
        self.steps = 0
        self.samples = 0
        self.tokens_received = 0
        self.row_bytes = 0
        self.targets = 0.0
        self.rows_answered = 0
        self.finished = False
        self._cache = cache
        self._width = width
        self._max_tokens = config.model.max_tokens
        self._joint = joint
        self._codec = config.session.codec
        self._logits_codec = config.session.logits_codec
        self._deadline = config.session.deadline_s
        self._ahead: deque[Batch] = deque()
        self.first = first
        self._received = first
        self._window = 1

    @property
    def name(self) -> str:
        """The owner's public name."""
        return self.hello.owner

    @property
    def split(self) -> str:
        """Which of the owner's splits this session is about."""
        return "train" if self.hello.mode == "train" else "test"

    def handshake(self, files: Mapping[str, bytes], digest: str, *, welcomed: bool = False) -> None:
        """Welcome the owner, send the bottom if it has none yet, and learn how much follows.

        Args:
            files: the bottom's bundle.
            digest: its digest.
            welcomed: the WELCOME frame is already under way.

        Raises:
            FrameError: counts out of range, or an unexpected frame.
        """
        if not welcomed:
            self.link.send(Kind.WELCOME, welcome_header(digest, self._codec, self._logits_codec))
        frame = self.link.recv(PATIENCE * self._deadline)
        if frame.kind is Kind.NEED:
            send_files(self.link, files)
            frame = self.link.recv(PATIENCE * self._deadline)
        if frame.kind is not Kind.READY:
            raise FrameError(f"{frame.kind.name} frame: must be READY")
        self.steps, self.samples = frame["batches"], frame["samples"]
        if not 1 <= self.steps < 1 << 31 or not 1 <= self.samples <= MAX_SLOTS:
            raise FrameError(
                f"READY with {self.steps} batches of {self.samples} samples: must be >= 1 each, "
                f"samples <= {MAX_SLOTS}"
            )
        if self.steps > (most := self._most_steps()):
            raise FrameError(
                f"READY with {self.steps} batches of {self.samples} samples: must be <= {most}, as "
                "the settings make of them"
            )
        if self.steps <= self.first:
            raise FrameError(f"READY with {self.steps} batches: {self.first} were taken already")

    def _most_steps(self) -> int:
        if not self._batch_size:
            return 1 << 31
        once = -(-self.samples // self._batch_size)
        if self.hello.mode != "train":
            return once
        steps = self._train.epochs * once
        return min(steps, self._train.max_steps or steps)

    def start(self, window: int) -> None:
        """Give credit for ``window`` batches and say which samples are already here."""
        self._window = window
        held = b"" if self._joint else self._cache.bitmap(self.name, self.split, self.samples)
        self.link.send(Kind.START, {"window": window}, held)

    def batch(self) -> Batch:
        """Return the next step's batch."""
        while not self._ahead:
            frame = self.link.recv(self._deadline)
            if frame.kind is not Kind.BATCH:
                raise FrameError(f"{frame.kind.name} frame: must be BATCH")
            self._ahead.append(self._read_batch(frame))
        return self._ahead.popleft()

    def _read_batch(self, frame: Frame) -> Batch:
        slots, fresh, lengths = frame["slots"], frame["fresh"], frame["lengths"]
        if frame["step"] != self._received:
            raise FrameError(f"BATCH step {frame['step']}: must be {self._received}")
        if frame["last"] != (self._received + 1 == self.steps):  # else a session need not end
            raise FrameError(f"BATCH step {frame['step']}: last must be true at {self.steps - 1}")
        if len(self._ahead) >= self._window:
            raise FrameError(f"BATCH step {frame['step']}: over the window of {self._window}")
        if not slots or len(set(slots)) != len(slots) or max(slots) >= self.samples:
            raise FrameError(f"BATCH slots: must be distinct, >= 1 of them, below {self.samples}")
        if self._batch_size and len(slots) > self._batch_size:
            raise FrameError(f"BATCH of {len(slots)} samples: must be <= {self._batch_size}")
        if len(fresh) != len(lengths) or not set(fresh) <= set(slots):
            raise FrameError("BATCH fresh slots: must be among its slots, with one length each")
        if len(set(fresh)) != len(fresh):
            raise FrameError("BATCH fresh slots: must be distinct")
        if lengths and (min(lengths) < 1 or max(lengths) > self._max_tokens):
            raise FrameError(f"BATCH lengths: must be in [1, {self._max_tokens}] tokens")
        if fresh and frame["dim"] != self._width:
            raise FrameError(f"BATCH width {frame['dim']}: must be {self._width}")
        total = sum(lengths)
        rows = decode_rows(frame.body, (total, self._width), frame["codec"])
        parts = dict(zip(fresh, torch.split(rows, lengths), strict=True)) if fresh else {}
        self.tokens_received += total
        self.row_bytes += len(frame.body)
        self._received += 1
        if self._joint:
            if len(parts) != len(slots):
                raise FrameError("BATCH of a joint bottom: must bring every slot anew")
            return Batch(frame["step"], slots, [parts[s] for s in slots], frame["last"])
        exact = torch.bfloat16 if frame["codec"] == "bf16" else torch.float32
        for slot, part in parts.items():
            self._cache.put(self.name, self.split, slot, part, exact)
        known = self._cache.get(self.name, self.split, slots)
        return Batch(frame["step"], slots, known, frame["last"])

    def send_logits(self, batch: Batch, logits: Tensor) -> None:
        """Send the top's output for one batch: (B, C), or (tokens, V) for language modelling.

        Where the owner holds the head: final hidden states of the positions that the head reads.
        """
        header = {
            "step": batch.step,
            "codec": self._logits_codec,
            "shape": list(logits.shape),
        }
        self.link.send(Kind.LOGITS, header, encode_rows(logits, self._logits_codec))
        self.rows_answered += len(logits)

    def gradient(
        self, batch: Batch, shape: Sequence[int], *, withheld: bool = False
    ) -> tuple[Tensor, float]:
        """Return (gradient of the owner's mean loss by what was sent, targets in that mean).

        Batches that the owner sent ahead are read on the way, which uses the waiting time.

        Args:
            batch: of the step.
            shape: of what was sent.
            withheld: whether the owner returns a gradient of no rows.
        """
        while True:
            frame = self.link.recv(self._deadline)
            if frame.kind is Kind.BATCH:
                self._ahead.append(self._read_batch(frame))
                continue
            if frame.kind is not Kind.GRAD or frame["step"] != batch.step:
                raise FrameError(f"{frame.kind.name} frame: must be GRAD of step {batch.step}")
            weight = frame["weight"]
            if not 0 < weight <= shape[0]:  # one target per row of logits at most
                raise FrameError(f"GRAD weight {weight}: must be in (0, {shape[0]}]")
            returned = (0, *shape[1:]) if withheld else shape
            rows = decode_rows(frame.body, returned, frame["codec"], max_abs=1e3)
            self.targets += weight
            return rows, weight

    def send_hidden_gradient(self, batch: Batch, rows: Tensor) -> None:
        """Send dL/drepresentations of the owner's own mean loss, tokens stacked: (N, d)."""
        header = {"step": batch.step, "codec": self._codec, "shape": list(rows.shape)}
        self.link.send(Kind.HIDDEN_GRAD, header, encode_rows(rows, self._codec))

    def parting_reason(self) -> str:
        """Return why an owner that has gone says it gave up; empty if it said nothing.

        Sending to it fails as soon as its stream has ended, before its last frame has been read.
        """
        while self.link.closed:
            try:
                self.link.recv(0.0)
            except SessionError as error:
                return f"{type(error).__name__}: {error}" if "peer gave up" in str(error) else ""
            except FrameError:
                return ""
        return ""

    def finish(self) -> None:
        """Receive DONE and say BYE; afterwards the owner replies to its Flower message."""
        frame = self.link.expect(Kind.DONE, self._deadline)
        if frame["steps"] != self.steps:
            raise SessionError(f"DONE after {frame['steps']} steps: must be {self.steps}")
        self.finished = True
        self.link.send(Kind.BYE, {"reason": "done"})
