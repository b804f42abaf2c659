"""A session's batches, sent as the server gives credit: what training and prediction share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fedsplit.errors import FrameError, SessionError
from fedsplit.models.splitting.representations import represent
from fedsplit.owners.ledger.disclosure import (
    Announcement,
    Outgoing,
    Representations,
    Source,
    Training,
    notice,
)
from fedsplit.owners.measuring import OwnTexts
from fedsplit.owners.samples import Samples
from fedsplit.owners.split.output import OutputReader
from fedsplit.privacy.perturb import SamplePerturber, View
from fedsplit.wire.codecs import decode_rows
from fedsplit.wire.frames import Frame, Kind


class BatchSession(ABC):
    """Answers one session's frames; what is done with the server's output is a subclass's.

    What leaves per step: the representations of samples that the server does not hold yet, after
    the privacy mechanism, with slot numbers and text lengths in tokens.

    Args:
        bottom: (input_ids (B, T), attention_mask (B, T)) -> (B, T, d); run without dropout and on
            each text alone, since noise drawn once protects one representation.
        reader: reads the server's output; its samples are the session's.
        batches: slots of each step, in order.
        perturber: the privacy mechanism with the owner's secret.
        mode: ``train``, ``evaluate`` or ``predict``.
        codec: wire form of representations.
        joint: whether the bottom changes between steps; then every batch is sent anew.
        views: different noises of one text that the session may send.
        own: what the owner measures its own protection on.
        passes: what part of a pass over the samples each step is; None: its share of them.
    """

    def __init__(
        self,
        bottom: nn.Module,
        reader: OutputReader,
        batches: Sequence[np.ndarray],
        perturber: SamplePerturber,
        *,
        mode: str,
        codec: str,
        joint: bool = False,
        views: int = 1,
        own: OwnTexts | None = None,
        passes: Sequence[float] | None = None,
    ) -> None:
        self.bottom = bottom.eval()
        self.reader = reader
        self.samples: Samples = reader.samples
        self.batches = [[int(slot) for slot in batch] for batch in batches]
        self._passes = passes or [len(batch) / len(self.samples) for batch in self.batches]
        self.perturber = perturber
        lengths = self.samples.lengths
        self.source = Source(bottom, perturber, max(lengths), sum(lengths), joint, own)
        self.held: set[int] = set()  # slots whose representations the server has
        self.sent = 0  # batches sent
        self.answered = 0  # outputs answered
        self.finished = 0  # steps that are over
        self._first = 0  # step that this session began with
        self._mode = mode
        self._views = views
        self._codec = codec

    @property
    def learns(self) -> bool:
        """Whether the bottom learns in this session."""
        return self.source.moves and self._mode == "train"

    @property
    def done(self) -> bool:
        """Whether every step of the session is over."""
        return self.finished == len(self.batches)

    def ready(self) -> Outgoing:
        """Return the frame that announces how much follows."""
        header = {
            "batches": len(self.batches),
            "samples": len(self.samples),
            "mechanism": self.perturber.mechanism.guarantee(self._views),
        }
        shown = Announcement(
            batches=len(self.batches), source=self.source, training=self._training()
        )
        return Outgoing(Kind.READY, header, shown)

    def _training(self) -> Training | None:
        """Return what the owner trains itself in this session; here nothing."""
        return None

    def handle(self, frame: Frame) -> Iterator[Outgoing]:
        """Yield the frames that answer ``frame``; the first is ready before the last is computed.

        Raises:
            SessionError: the frame does not belong here.
            FrameError: its step, shape or numbers are not acceptable.
        """
        if frame.kind is Kind.START:
            if self.sent > self._first:
                raise SessionError("START frame: must come once, before any batch")
            self.held = slots_held(frame.body, len(self.samples))
            # A joint bottom changes with every step: a batch sent ahead would be of an old one.
            window = 1 if self.learns else max(1, frame["window"])
            yield from self._send_batches(window)
        elif frame.kind is Kind.LOGITS:
            step = self._step(frame, self.answered, self.sent)
            slots = self.batches[step]
            shape = tuple(frame["shape"])
            self.reader.check(shape, slots)
            values = decode_rows(frame.body, shape, frame["codec"])
            self.answered += 1
            yield from self._on_output(step, slots, values)
        else:
            yield from self._on_other(frame)

    @abstractmethod
    def _on_output(self, step: int, slots: Sequence[int], values: Tensor) -> Iterator[Outgoing]:
        """Yield what answers the server's output for a step."""

    def _on_other(self, frame: Frame) -> Iterator[Outgoing]:
        """Yield what answers a frame of another kind; here none is expected."""
        raise SessionError(f"{frame.kind.name} frame: not expected in {self._mode}")

    def _send_batches(self, count: int) -> Iterator[Outgoing]:
        for _ in range(count):
            if self.sent >= len(self.batches):
                return
            step = self.sent
            self.sent += 1
            yield self._batch(step)

    def _batch(self, step: int) -> Outgoing:
        """Return one step's samples, with the representations that the server does not hold."""
        slots = self.batches[step]
        joint = self.source.moves
        fresh = slots if joint else [s for s in slots if s not in self.held]
        before = self.perturber.tokens_touched
        views = self._represent(step, fresh)
        rows = torch.cat([view.rows for view in views]) if views else None
        if not joint:
            self.held.update(fresh)
        header = {
            "step": step,
            "slots": slots,
            "fresh": fresh,
            "lengths": [int(self.samples.ids[s].shape[0]) for s in fresh],
            "codec": self._codec,
            "dim": 0 if rows is None else int(rows.shape[1]),
            "last": self.sent == len(self.batches),
        }
        shown = Representations(
            used=len(slots),
            epochs=None if self._mode == "predict" else self._passes[step],
            texts=self._identities(fresh),
            noises=tuple(view.noise for view in views),
            rows=rows,
            touched=self.perturber.tokens_touched - before,
            source=self.source,
        )
        return Outgoing(Kind.BATCH, header, shown)

    def _represent(self, step: int, slots: Sequence[int]) -> list[View]:
        """Return the privatised representation of each of ``slots``."""
        samples = self.samples
        return [
            self.perturber.view(clean.detach(), samples.ids[slot], samples.texts[slot])
            for slot, clean in zip(slots, self._hidden(step, slots), strict=True)
        ]

    def _hidden(self, step: int, slots: Sequence[int]) -> list[Tensor]:
        """Return the bottom's output for each sample of a step, (T_i, d)."""
        with torch.no_grad():
            return represent(self.bottom, [self.samples.ids[slot] for slot in slots])

    def _identities(self, slots: Sequence[int]) -> tuple[bytes, ...]:
        return tuple(self.samples.texts[slot] for slot in slots)

    def _advance(self) -> Iterator[Outgoing]:
        """Close a step, and yield the next batch or the session's last frame."""
        self.finished += 1
        if self.done:
            yield notice(Kind.DONE, {"samples": len(self.samples), "steps": self.finished})
            return
        yield from self._send_batches(1)

    def _step(self, frame: Frame, expected: int, bound: int) -> int:
        if frame["step"] != expected or expected >= bound:
            raise FrameError(f"{frame.kind.name} step {frame['step']}: must be {expected}")
        return expected


def slots_held(bitmap: bytes | memoryview, slots: int) -> set[int]:
    """Return the slots whose bit is set; an empty bitmap means none.

    Raises:
        FrameError: if the bitmap is of another length.
    """
    if len(bitmap) == 0:
        return set()
    if len(bitmap) != (slots + 7) // 8:
        raise FrameError(f"slot bitmap of {len(bitmap)} bytes: must be {(slots + 7) // 8}")
    bits = np.unpackbits(np.frombuffer(bitmap, dtype=np.uint8), count=slots)
    return {int(i) for i in np.flatnonzero(bits)}
