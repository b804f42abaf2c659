"""The owner's half of split tuning, as a machine that answers frames with frames.

The same object serves a stream (one live session per round) and Flower messages (a new process per
message): it asks for nothing but the last frame and its own :meth:`SplitOwner.state`.

What leaves, per step: the representations of samples the server does not hold yet, after the
privacy mechanism; the gradient of the private-label loss with respect to the server's output; slot
numbers, text lengths in tokens, and the number of samples or targets.  With a head at the server,
that gradient tells the labels (arXiv 2102.08504), unless ``labels.protection`` does something about
it (:mod:`fedsplit.owners.split.label_side`, :mod:`fedsplit.privacy.labels.table`).
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedsplit.errors import FrameError, ModelError, SessionError
from fedsplit.owners.samples import Samples
from fedsplit.owners.split.label_side import LabelSide
from fedsplit.owners.split.own_training import DpSettings, OwnTraining
from fedsplit.privacy.perturb import SamplePerturber
from fedsplit.wire.codecs import decode_rows, encode_rows
from fedsplit.wire.frames import Frame, Kind

Outgoing = tuple[Kind, dict[str, Any], bytes]


@dataclass(frozen=True)
class SplitSettings:
    """What one session of an owner does.

    Attributes:
        mode: ``train`` or ``evaluate``.
        joint: whether the bottom learns; then every batch is sent anew.
        codec: wire form of representations and their gradients.
        logits_codec: wire form of the server's output and its gradients.
        bottom_lr: learning rate of the bottom (joint).
        head_rates: learning rate of the owner's head at each step; empty: 1e-3 at every one.
        optimizer: ``adamw`` or ``sgd``, for what the owner trains.
        weight_decay: decoupled weight decay of it.
        clip: bound on the gradient norm of the bottom, and on that of the head, 0 = none.
    """

    mode: str
    joint: bool
    codec: str
    logits_codec: str
    bottom_lr: float = 1e-5
    head_rates: tuple[float, ...] = ()
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    clip: float = 0.0


class SplitOwner:
    """Answers one session's frames.

    Args:
        bottom: (input_ids (B, T), attention_mask (B, T)) -> (B, T, d); run without dropout, since
            noise drawn once protects one representation, not a family of them.
        samples: the split that this session works on.
        batches: slots of each step, in order.
        views: the noise view of each step; 0 for a frozen bottom.
        perturber: the privacy mechanism with the owner's secret.
        settings: see :class:`SplitSettings`.
        side: the labels' side of a step; None: the head is at the server, nothing is protected.
        private: DP-SGD for what the owner trains; None: plain steps.
    """

    def __init__(
        self,
        bottom: nn.Module,
        samples: Samples,
        batches: Sequence[np.ndarray],
        views: Sequence[int],
        perturber: SamplePerturber,
        settings: SplitSettings,
        side: LabelSide | None = None,
        private: DpSettings | None = None,
    ) -> None:
        self.bottom = bottom.eval()
        self.samples = samples
        self.batches = [[int(slot) for slot in batch] for batch in batches]
        self.views = list(views)
        self.perturber = perturber
        self.settings = settings
        self.held: set[int] = set()  # slots whose representations the server has
        self._first = 0  # step that this session began with
        self.sent = 0  # batches sent
        self.answered = 0  # logits answered
        self.finished = 0  # steps that are over
        self.loss_sum = 0.0
        self.weight_sum = 0.0
        self.correct = 0
        self._before = (0, 0)  # tokens with reduced noise, and all, that earlier processes sent
        self._graphs: dict[int, Tensor] = {}
        self.side = side or LabelSide(samples)
        self.training = OwnTraining(
            {n: p for n, p in bottom.named_parameters() if p.requires_grad and settings.joint},
            self.side.parameters,
            settings,
            private,
        )
        if settings.joint and not self.training.bottom:
            raise ModelError("joint bottom has 0 trainable parameters: must be >= 1")

    def begin_at(self, step: int) -> None:
        """Begin with a later step: an interrupted session took those before.

        Raises:
            SessionError: the steps before changed what this owner trains, or there is no such step.
        """
        if step and (self.training.optimizer is not None or self.settings.mode != "train"):
            raise SessionError(f"offer's first step {step}: must be 0, as this owner's part moves")
        if step and step >= len(self.batches):
            raise SessionError(f"offer's first step {step}: must be below {len(self.batches)}")
        self._first = self.sent = self.answered = self.finished = step

    @property
    def _learns(self) -> bool:
        """Whether the bottom learns in this session."""
        return self.settings.joint and self.settings.mode == "train"

    def ready(self) -> Outgoing:
        """Return the frame that announces how much follows."""
        header = {
            "batches": len(self.batches),
            "samples": len(self.samples),
            "mechanism": self.perturber.mechanism.guarantee(max(1, len(set(self.views)))),
        }
        return Kind.READY, header, b""

    def handle(self, frame: Frame) -> Iterator[Outgoing]:
        """Yield the frames that answer ``frame``; the first is ready before the last is computed.

        Raises:
            SessionError: the frame does not belong here.
            FrameError: its step, shape or numbers are not acceptable.
        """
        if frame.kind is Kind.START:
            if self.sent > self._first:
                raise SessionError("START frame: must come once, before any batch")
            self.held = _slots_held(frame.body, len(self.samples))
            # A joint bottom changes with every step: a batch sent ahead would be of an old one.
            window = 1 if self._learns else max(1, frame["window"])
            yield from self._send_batches(window)
        elif frame.kind is Kind.LOGITS:
            yield from self._on_logits(frame)
        elif frame.kind is Kind.HIDDEN_GRAD and self._learns:
            self._on_hidden_grad(frame)
            yield from self._advance()
        else:
            raise SessionError(f"{frame.kind.name} frame: not expected in {self.settings.mode}")

    def _send_batches(self, count: int) -> Iterator[Outgoing]:
        for _ in range(count):
            if self.sent >= len(self.batches):
                return
            step = self.sent
            slots = self.batches[step]
            fresh = slots if self.settings.joint else [s for s in slots if s not in self.held]
            body = b""
            dim = 0
            if fresh:
                rows = self._represent(step, fresh)
                dim = int(rows.shape[1])
                body = encode_rows(rows, self.settings.codec)
            if not self.settings.joint:
                self.held.update(fresh)
            self.sent += 1
            header = {
                "step": step,
                "slots": slots,
                "fresh": fresh,
                "lengths": [int(self.samples.ids[s].shape[0]) for s in fresh],
                "codec": self.settings.codec,
                "dim": dim,
                "last": self.sent == len(self.batches),
            }
            yield Kind.BATCH, header, body

    def _represent(self, step: int, slots: Sequence[int]) -> Tensor:
        """Return privatised representations, the tokens of all ``slots`` stacked: (N, d)."""
        hidden = self._forward(slots)
        if self._learns:
            self._graphs[step] = hidden
        view = self.views[step]
        rows = []
        for row, slot in enumerate(slots):
            ids = self.samples.ids[slot]
            clean = hidden[row, : ids.shape[0]].detach()  # (T, d)
            rows.append(self.perturber.perturb(clean, ids, view))
        return torch.cat(rows)

    def _forward(self, slots: Sequence[int]) -> Tensor:
        ids, mask = self.samples.padded(slots)
        with torch.set_grad_enabled(self._learns):
            hidden: Tensor = self.bottom(ids, mask)  # (B, T, d)
        return hidden

    def _on_logits(self, frame: Frame) -> Iterator[Outgoing]:
        step = self._step(frame, self.answered, self.sent)
        slots = self.batches[step]
        shape = tuple(frame["shape"])
        self.side.check(shape, slots)
        values = decode_rows(frame.body, shape, frame["codec"])
        self.answered += 1
        train = self.settings.mode == "train"
        found = self.side.answer(values, slots, train)
        self.loss_sum += found.loss * found.weight
        self.weight_sum += found.weight
        self.correct += found.right
        if train:
            header = {
                "step": step,
                "codec": self.settings.logits_codec,
                "shape": list(shape),
                "weight": found.weight,
            }
            yield Kind.GRAD, header, encode_rows(found.gradient, self.settings.logits_codec)
            self.training.step_head(
                step,
                found.head,
                lambda at: self.side.sample_gradients(values, slots, at),
                len(slots),
            )
        if not self._learns:
            yield from self._advance()

    def _on_hidden_grad(self, frame: Frame) -> None:
        step = self._step(frame, self.finished, self.answered)
        slots = self.batches[step]
        hidden = self._graphs.pop(step, None)
        if hidden is None:  # a new process: the graph is gone, the bottom is as it was
            hidden = self._forward(slots)
        shape = (self._tokens(slots), hidden.shape[2])
        if tuple(frame["shape"]) != shape:
            raise FrameError(f"HIDDEN_GRAD shape {tuple(frame['shape'])}: must be {shape}")
        rows = decode_rows(frame.body, shape, frame["codec"])
        parts = torch.split(rows, [int(self.samples.ids[s].shape[0]) for s in slots])

        def backward() -> None:
            grad = torch.zeros_like(hidden)
            for row, part in enumerate(parts):
                grad[row, : len(part)] = part.to(grad)
            torch.autograd.backward([hidden], [grad])

        def of_sample(at: int) -> Sequence[Tensor]:
            # Of its own mean loss: how many targets the others have must not show in it.
            share = sum(map(self.side.targets, slots)) / self.side.targets(slots[at])
            own = self._forward([slots[at]])[0]
            return torch.autograd.grad(own, self.training.bottom, parts[at].to(own) * share)

        self.training.step_bottom(backward, of_sample, len(slots))

    def _advance(self) -> Iterator[Outgoing]:
        self.finished += 1
        if self.finished == len(self.batches):
            yield Kind.DONE, {"samples": len(self.samples), "steps": self.finished}, b""
            return
        yield from self._send_batches(1)

    def _step(self, frame: Frame, expected: int, bound: int) -> int:
        if frame["step"] != expected or expected >= bound:
            raise FrameError(f"{frame.kind.name} step {frame['step']}: must be {expected}")
        return expected

    def _tokens(self, slots: Sequence[int]) -> int:
        return sum(int(self.samples.ids[s].shape[0]) for s in slots)

    @property
    def done(self) -> bool:
        """Whether every step of the session is over."""
        return self.finished == len(self.batches)

    def metrics(self) -> dict[str, float | int]:
        """Return the session's averages; ``num-examples`` is Flower's weighting key."""
        weight = max(self.weight_sum, 1.0)
        touched, tokens = self._touched()
        return {
            "num-examples": len(self.samples),
            "targets": self.weight_sum,
            "steps": self.finished - self._first,
            "loss": self.loss_sum / weight,
            "accuracy": self.correct / weight,
            "share-touched": touched / max(1, tokens),
            **self.training.metrics(self.finished),
        }

    def _touched(self) -> tuple[int, int]:
        done = self.perturber.report()
        return self._before[0] + done["tokens_touched"], self._before[1] + done["tokens"]

    def weights(self) -> dict[str, Tensor]:
        """Return what the owner trains by name, for averaging: its bottom (joint), its head."""
        return self.training.weights()

    def load_weights(self, state: Mapping[str, Tensor]) -> None:
        """Replace what the owner trains by the averaged weights.

        Raises:
            ModelError: on a missing, foreign, misshapen or non-finite tensor; nothing is changed.
        """
        self.training.load_weights(state)

    def state(self) -> dict[str, Any]:
        """Return the JSON-able part of what the next process needs (messages transport)."""
        held = np.zeros(len(self.samples), dtype=np.uint8)
        held[list(self.held)] = 1
        return {
            "held": base64.b64encode(np.packbits(held).tobytes()).decode(),
            "first": self._first,
            "sent": self.sent,
            "answered": self.answered,
            "finished": self.finished,
            "loss_sum": self.loss_sum,
            "weight_sum": self.weight_sum,
            "correct": self.correct,
            "touched": list(self._touched()),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state` was taken."""
        self.held = _slots_held(base64.b64decode(state["held"]), len(self.samples))
        self._first = int(state["first"])
        self.sent, self.answered = int(state["sent"]), int(state["answered"])
        self.finished, self.correct = int(state["finished"]), int(state["correct"])
        self.loss_sum, self.weight_sum = float(state["loss_sum"]), float(state["weight_sum"])
        self._before = (int(state["touched"][0]), int(state["touched"][1]))

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer of what the owner trains in this session, else None."""
        return self.training.optimizer


def _slots_held(bitmap: bytes | memoryview, slots: int) -> set[int]:
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
