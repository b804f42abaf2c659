"""The labels' side of a step: from the server's output to a loss and its gradients.

With the head at the server, logits come down and their gradients go up.  With the head here
(U-shape, ``labels.protection = "client-head"``), logits and labels never leave, and the owner
trains the head itself.  That hides neither the direction of a gradient, which still separates two
classes, nor its norm (:mod:`fedsplit.attacks.labels.leakage`): for that, name a protection of the
gradients beside the head's place, or draw the labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsplit.confusion import MOST_CLASSES as MOST_COUNTED
from fedsplit.errors import ConfigError, FrameError
from fedsplit.owners.label_recovery import LabelRecovery
from fedsplit.owners.split.output import OutputReader
from fedsplit.privacy.labels.readers import MOST_CLASSES, known_evidence, label_evidence
from fedsplit.privacy.labels.table import GradientShield

MAX_LOGIT = 30.0
"""Bound on a logit's distance from its row's mean, nats; beyond it a class's probability is 0 or 1
to every float, and what crafted logits could add is only how much a loss says of one sample."""
MAX_RMS = 100.0
"""Bound on the root mean square of a hidden state's coordinates."""


@dataclass(frozen=True)
class Answer:
    """What one step came to.

    Attributes:
        loss: mean over the step's targets (nats).
        weight: number of targets.
        right: of them, predicted rightly.
        gradient: of the mean loss with respect to what came down, same shape; empty in evaluation,
            and of no rows where none leaves.
        head: gradients of the mean loss with respect to the head's trained parameters.
        per_text: (B, 2), each text's own mean loss and share of right predictions; None where no
            noisy report is made of them.
        confusion: (C, C), texts of each class (row) by the class they were taken for; None in
            training, without labels, or with many classes.
    """

    loss: float
    weight: float
    right: int
    gradient: Tensor
    head: list[Tensor]
    per_text: Tensor | None = None
    confusion: Tensor | None = None


class LabelSide:
    """Holds the labels of a session and computes the loss on them.

    Args:
        reader: reads the server's output; its samples have the labels to train on.
        shield: what is done to the gradients of each step, or None.
        transition: (C, C), row = true label; the loss is corrected for labels drawn with it
            (forward correction, Patrini et al., arXiv 1609.03683); None: no correction.
        protection: the label protection in force, by its settings, for the ledger.
        recovery: judges what gradients tell of labels before they leave; None: no rule asks for it.
        per_text: whether answers carry each text's own loss, for a noisy report.
        withholds: whether no gradient leaves.

    Raises:
        ConfigError: gradients are to be shielded, and the head reads several rows per sample.
    """

    def __init__(
        self,
        reader: OutputReader,
        *,
        shield: GradientShield | None = None,
        transition: Tensor | None = None,
        protection: Mapping[str, Any] | None = None,
        recovery: LabelRecovery | None = None,
        per_text: bool = False,
        withholds: bool = False,
    ) -> None:
        self.reader = reader
        self.samples = reader.samples
        self.protection = dict(protection or {})
        self._shield = shield
        self._transition = transition
        self._recovery = recovery
        self._per_text = per_text
        self.withholds = withholds
        every = reader.head is not None and reader.positions == "all"
        if shield is not None and every and not shield.protection.takes_tokens:
            raise ConfigError(
                f"labels.protection with {shield.protection.name}: must have a head that reads one "
                "position per text, or the head at the server"
            )

    def answer(self, values: Tensor, slots: Sequence[int], train: bool) -> Answer:
        """Return loss and gradients for what the server sent.

        Args:
            values: logits or hidden states, of a shape that the reader's check let pass.
            slots: the step's samples.
            train: whether gradients are wanted.

        What is out of bounds (``MAX_LOGIT``, ``MAX_RMS``) is clipped before anything is made of it.

        Raises:
            FrameError: fewer classes than labels.
            PolicyError: the gradients would tell more labels than the owner's rules allow.
        """
        output = values
        values = bounded_logits(values) if self.reader.head is None else bounded_hidden(values)
        values = values.detach().requires_grad_(train)
        parameters = list(self.reader.parameters.values()) if train else []
        with torch.set_grad_enabled(train):
            scores, targets = self._scores(values, slots)
            loss = self._loss(scores, targets, train)
        right = int((scores.argmax(dim=1) == targets).sum())
        each = self._each(scores, targets, slots) if self._per_text else None
        if not train:
            table = self._confusion(scores, targets)
            return Answer(float(loss), float(len(targets)), right, torch.empty(0), [], each, table)
        if self.withholds:
            gradient, head = values.new_empty(0, values.shape[1]), _gradients(loss, parameters)
        else:
            gradient, *head = _gradients(loss, [values, *parameters])
            if self._shield is not None:
                gradient = self._shielded(gradient, targets, slots, output)
            if self._recovery is not None:
                self._recovery.judge(slots, self._evidence(values, gradient, targets, slots))
        return Answer(float(loss.detach()), float(len(targets)), right, gradient, head, each)

    def _shielded(
        self, gradient: Tensor, targets: Tensor, slots: Sequence[int], output: Tensor
    ) -> Tensor:
        """Return what may leave instead of the gradient of a step."""
        assert self._shield is not None
        if self.samples.labels is not None:
            return self._shield(gradient, targets, slots, output)
        keep, _ = self._next_tokens(slots)
        sent = torch.zeros_like(gradient)  # a text's last row predicts nothing
        sent[keep] = self._shield(gradient[keep], targets, slots, output)
        return sent

    def told(self, values: Tensor, slots: Sequence[int]) -> Tensor | None:
        """Return what the gradients would tell of the labels if the server sent ``values``.

        Nothing is recorded and nothing is made of it: for the owner's own measurement.

        Returns:
            (readers, B, C), see :func:`~fedsplit.privacy.labels.readers.label_evidence`; None:
            every label.
        """
        output = values
        values = bounded_logits(values) if self.reader.head is None else bounded_hidden(values)
        values = values.detach().requires_grad_(True)
        with torch.enable_grad():
            scores, targets = self._scores(values, slots)
            loss = self._loss(scores, targets, True)
        (gradient,) = torch.autograd.grad(loss, [values])
        if self._shield is not None:
            gradient = self._shielded(gradient, targets, slots, output)
        return self._evidence(values, gradient, targets, slots)

    def _evidence(
        self, values: Tensor, sent: Tensor, targets: Tensor, slots: Sequence[int]
    ) -> Tensor | None:
        """Return what the gradients of a step tell of its labels; None: everything."""
        classes = self.reader.classes
        if self.samples.labels is None or not 2 <= classes <= MOST_CLASSES:
            return None
        if self._shield is None:  # the label that the loss was of stands in the gradient
            return known_evidence(targets, classes)
        found = []
        for c in range(classes):
            with torch.enable_grad():
                own = values.detach().requires_grad_(True)
                scores, _ = self._scores(own, slots)
                loss = self._loss(scores, torch.full_like(targets, c), True)
            found.append(self._flat(torch.autograd.grad(loss, [own])[0], slots))
        return label_evidence(self._flat(sent, slots), torch.stack(found))

    def _flat(self, rows: Tensor, slots: Sequence[int]) -> Tensor:
        """Return each sample's own rows as one row, (B, longest * d)."""
        own = self.reader.rows(rows.detach(), slots)
        return nn.utils.rnn.pad_sequence(list(own), batch_first=True).flatten(1)

    def _confusion(self, scores: Tensor, targets: Tensor) -> Tensor | None:
        classes = scores.shape[1]
        if self.samples.labels is None or classes > MOST_COUNTED:
            return None
        pairs = targets * classes + scores.argmax(dim=1)
        return torch.bincount(pairs, minlength=classes**2).reshape(classes, classes)

    def _each(self, scores: Tensor, targets: Tensor, slots: Sequence[int]) -> Tensor:
        """Return each text's own mean loss and share of right predictions, (B, 2)."""
        with torch.no_grad():
            losses = functional.cross_entropy(scores.float(), targets, reduction="none")
            rows = torch.stack([losses, (scores.argmax(dim=1) == targets).float()], dim=1)
            counts = [self.targets(slot) for slot in slots]
            return torch.stack([part.mean(0) for part in torch.split(rows, counts)])

    def sample_gradients(self, values: Tensor, slots: Sequence[int], at: int) -> list[Tensor]:
        """Return the head's gradients of one sample's own mean loss, the ``at``-th of ``slots``."""
        own = self.reader.rows(values.detach(), slots)[at]
        parameters = list(self.reader.parameters.values())
        with torch.enable_grad():
            scores, targets = self._scores(own, [slots[at]])
            loss = self._loss(scores, targets, True)
        return _gradients(loss, parameters)

    def targets(self, slot: int) -> int:
        """Return how many targets one sample has."""
        if self.samples.labels is not None:
            return 1
        return len(self.samples.predicting(slot))

    def _loss(self, scores: Tensor, targets: Tensor, train: bool) -> Tensor:
        if self._transition is None or not train:
            return functional.cross_entropy(scores.float(), targets)
        drawn = scores.float().softmax(dim=1) @ self._transition.float()  # (N, C)
        return functional.nll_loss(drawn.clamp_min(1e-30).log(), targets)

    def _scores(self, values: Tensor, slots: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return one row of scores per target, and the targets."""
        logits = bounded_logits(self.reader.logits(values, slots))
        if self.samples.labels is None:
            keep, following = self._next_tokens(slots)
            return logits[keep], following
        targets = self.samples.labels[list(slots)]  # (B,)
        if int(targets.max()) >= logits.shape[1]:
            raise FrameError(f"LOGITS with {logits.shape[1]} classes: fewer than labels")
        return logits, targets

    def _next_tokens(self, slots: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the rows that predict something, and what they should predict."""
        keep, following, at = [], [], 0
        for slot in slots:
            ids, own = self.samples.ids[slot], self.samples.predicting(slot)
            keep.append(at + own)
            following.append(ids[1 + own])
            at += int(ids.shape[0])
        return torch.cat(keep), torch.cat(following)


def _gradients(loss: Tensor, by: Sequence[Tensor]) -> list[Tensor]:
    """Return the loss's gradients, zeros where it does not depend on a tensor."""
    if not by:
        return []
    found = torch.autograd.grad(loss, list(by), allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(by, found, strict=True)]


def bounded_logits(logits: Tensor) -> Tensor:
    """Return logits (N, C) with each within ``MAX_LOGIT`` of its row's mean.

    Honest logits are returned as they are, bit for bit.
    """
    own = logits.detach().float()
    mean = own.mean(1, keepdim=True)
    far = torch.maximum(own.amax(1, keepdim=True) - mean, mean - own.amin(1, keepdim=True))
    if float(far.max()) <= MAX_LOGIT:  # not where a sum overflows
        return logits
    mean = logits.detach().double().mean(1, keepdim=True)
    low, high = (mean - MAX_LOGIT).to(logits.dtype), (mean + MAX_LOGIT).to(logits.dtype)
    return torch.minimum(torch.maximum(logits, low), high)


def bounded_hidden(hidden: Tensor) -> Tensor:
    """Return hidden states (N, d), each scaled down to a root mean square of ``MAX_RMS`` at most.

    Honest states are returned as they are, bit for bit.
    """
    size = hidden.detach().double().square().mean(1, keepdim=True).sqrt()
    if float(size.max()) <= MAX_RMS:
        return hidden
    return (hidden.double() * (MAX_RMS / size.clamp_min(MAX_RMS))).to(hidden.dtype)
