"""The owner's half of split tuning, as a machine that answers frames with frames.

The same object serves a stream (one live session per round) and Flower messages (a new process per
message): it asks for nothing but the last frame and its own :meth:`SplitOwner.state`.

What leaves, per step, beside the batch: the gradient of the private-label loss with respect to the
server's output, and the number of samples or targets.  With a head at the server, that gradient
tells the labels (arXiv 2102.08504), unless ``labels.protection`` does something about it
(:mod:`fedsplit.owners.split.label_side`, :mod:`fedsplit.privacy.labels.table`).
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedsplit.errors import FrameError, ModelError, SessionError
from fedsplit.models.splitting.representations import represent
from fedsplit.owners.ledger.disclosure import Averages, Gradients, Outgoing, Training
from fedsplit.owners.measuring import OwnTexts
from fedsplit.owners.reports import SessionReport
from fedsplit.owners.samples import Samples
from fedsplit.owners.split.batches import BatchSession, slots_held
from fedsplit.owners.split.label_side import LabelSide
from fedsplit.owners.split.output import OutputReader
from fedsplit.owners.split.own_training import OwnTraining
from fedsplit.owners.split.settings import DpSettings, SplitSettings
from fedsplit.privacy.perturb import SamplePerturber
from fedsplit.sums import add_up
from fedsplit.wire.codecs import decode_rows
from fedsplit.wire.frames import Frame, Kind


class SplitOwner(BatchSession):
    """Answers the frames of one session of training or evaluation.

    Args:
        bottom: see :class:`~fedsplit.owners.split.batches.BatchSession`.
        samples: the split that this session works on.
        batches: slots of each step, in order.
        perturber: the privacy mechanism with the owner's secret.
        settings: see :class:`~fedsplit.owners.split.settings.SplitSettings`.
        side: the labels' side of a step; None: the head is at the server, nothing is protected.
        dp: DP-SGD for what the owner trains; None: plain steps.
        report: averages as they may leave; None: exact ones.
        own: what the owner measures its own protection on.
        passes: see :class:`~fedsplit.owners.split.batches.BatchSession`.

    Raises:
        ModelError: the bottom is to learn and has nothing to train.
    """

    def __init__(
        self,
        bottom: nn.Module,
        samples: Samples,
        batches: Sequence[np.ndarray],
        perturber: SamplePerturber,
        settings: SplitSettings,
        side: LabelSide | None = None,
        dp: DpSettings | None = None,
        report: SessionReport | None = None,
        own: OwnTexts | None = None,
        passes: Sequence[float] | None = None,
    ) -> None:
        self.report = report
        self.side = side or LabelSide(OutputReader(samples, classify=samples.labels is not None))
        super().__init__(
            bottom,
            self.side.reader,
            batches,
            perturber,
            mode=settings.mode,
            codec=settings.codec,
            joint=settings.joint,
            views=settings.views,
            own=own,
            passes=passes,
        )
        self.settings = settings
        self.loss_sum = 0.0
        self.weight_sum = 0.0
        self.correct: int | None = 0  # None: nothing is right or wrong
        self.sums: dict[str, float] = {}
        self._before = (0, 0)  # tokens with reduced noise, and all, that earlier processes sent
        self._graphs: dict[int, list[Tensor]] = {}
        self.training = OwnTraining(
            {n: p for n, p in bottom.named_parameters() if p.requires_grad and settings.joint},
            self.reader.parameters,
            settings,
            dp,
        )
        if settings.joint and not self.training.bottom:
            raise ModelError("joint bottom has 0 trainable parameters: must be >= 1")

    def _training(self) -> Training | None:
        if not self.settings.weights_leave:  # the owner's own affair
            return None
        return self.training.plan(self.batches, len(self.samples))

    def resume_at(self, step: int) -> None:
        """Begin with a later step: an interrupted session took those before.

        Raises:
            SessionError: the steps before changed what this owner trains, or there is no such step.
        """
        if step and (self.training.optimizer is not None or self.settings.mode != "train"):
            raise SessionError(f"offer's first step {step}: must be 0, as this owner's part moves")
        if step and step >= len(self.batches):
            raise SessionError(f"offer's first step {step}: must be below {len(self.batches)}")
        self._first = self.sent = self.answered = self.finished = step

    def _hidden(self, step: int, slots: Sequence[int]) -> list[Tensor]:
        if not self.learns:
            return super()._hidden(step, slots)
        self._graphs[step] = self._forward(slots)
        return self._graphs[step]

    def _forward(self, slots: Sequence[int]) -> list[Tensor]:
        """Return the learning bottom's output for each sample, (T_i, d), with its graph."""
        with torch.enable_grad():
            return represent(self.bottom, [self.samples.ids[slot] for slot in slots])

    def _on_output(self, step: int, slots: Sequence[int], values: Tensor) -> Iterator[Outgoing]:
        train = self.settings.mode == "train"
        found = self.side.answer(values, slots, train)
        self.loss_sum += found.loss * found.weight
        self.weight_sum += found.weight
        self.correct = None if found.right is None else (self.correct or 0) + found.right
        self.sums = add_up([self.sums, found.sums])
        if self.report is not None and found.per_text is not None:
            self.report.add(slots, found.per_text)
        if train:
            header = {
                "step": step,
                "codec": self.settings.logits_codec,
                "shape": list(found.gradient.shape),
                "weight": found.weight,
            }
            shown = Gradients(
                kind="logit-gradients" if self.reader.head is None else "hidden-gradients",
                values=found.gradient,
                texts=self._identities(slots),
                protection=self.side.protection,
            )
            yield Outgoing(Kind.GRAD, header, shown)
            self.training.step_head(
                step,
                found.head,
                lambda at: self.side.sample_gradients(values, slots, at),
                len(slots),
            )
        if not self.learns:
            yield from self._advance()

    def _on_other(self, frame: Frame) -> Iterator[Outgoing]:
        if frame.kind is not Kind.HIDDEN_GRAD or not self.learns:
            yield from super()._on_other(frame)
        self._on_hidden_grad(frame)
        yield from self._advance()

    def _on_hidden_grad(self, frame: Frame) -> None:
        step = self._step(frame, self.finished, self.answered)
        slots = self.batches[step]
        hidden = self._graphs.pop(step, None)
        if hidden is None:  # a new process: the graph is gone, the bottom is as it was
            hidden = self._forward(slots)
        lengths = [int(self.samples.ids[s].shape[0]) for s in slots]
        shape = (sum(lengths), hidden[0].shape[1])
        if tuple(frame["shape"]) != shape:
            raise FrameError(f"HIDDEN_GRAD shape {tuple(frame['shape'])}: must be {shape}")
        rows = decode_rows(frame.body, shape, frame["codec"])
        parts = torch.split(rows, lengths)

        def backward() -> None:
            pairs = zip(parts, hidden, strict=True)
            torch.autograd.backward(hidden, [part.to(clean) for part, clean in pairs])

        def of_sample(at: int) -> Sequence[Tensor]:
            # Of its own mean loss: how many targets the others have must not show in it.
            scale = sum(map(self.side.targets, slots)) / self.side.targets(slots[at])
            own = self._forward([slots[at]])[0]
            return torch.autograd.grad(own, self.training.bottom, parts[at].to(own) * scale)

        self.training.step_bottom(backward, of_sample, len(slots))

    def metrics(self) -> dict[str, float | int]:
        """Return the session's averages; ``num-examples`` is Flower's weighting key."""
        weight = max(self.weight_sum, 1.0)
        touched, tokens = self._touched()
        exact = {
            "num-examples": len(self.samples),
            "targets": self.weight_sum,
            "steps": self.finished - self._first,
            "loss": self.loss_sum / weight,
            **({} if self.correct is None else {"accuracy": self.correct / weight}),
            "share-touched": touched / max(1, tokens),
            **self.sums,
            **self.training.metrics(self.finished),
        }
        return exact if self.report is None else self.report.private(exact)

    def averages(self) -> Averages:
        """Return :meth:`metrics` as the owner's rules judge and the ledger records them."""
        epsilon = self.report.epsilon if self.report is not None else None
        return Averages(metrics=self.metrics(), texts=len(self._answered()), epsilon=epsilon)

    def _answered(self) -> set[int]:
        """Return the slots that the session's averages are over."""
        return {slot for batch in self.batches[self._first : self.answered] for slot in batch}

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

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer of what the owner trains in this session, else None."""
        return self.training.optimizer

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
            "sums": self.sums,
            "touched": list(self._touched()),
            "report": [] if self.report is None else self.report.state(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state` was taken."""
        self.held = slots_held(base64.b64decode(state["held"]), len(self.samples))
        self._first = int(state["first"])
        self.sent, self.answered = int(state["sent"]), int(state["answered"])
        self.finished = int(state["finished"])
        self.correct = None if state["correct"] is None else int(state["correct"])
        self.loss_sum, self.weight_sum = float(state["loss_sum"]), float(state["weight_sum"])
        self.sums = {str(key): float(value) for key, value in state["sums"].items()}
        self._before = (int(state["touched"][0]), int(state["touched"][1]))
        if self.report is not None:
            self.report.load_state(state["report"])
