"""The labels' side of a step: from the server's output to a loss and its gradients.

With the head at the server, logits come down and their gradients go up.  With the head here
(U-shape, ``labels.protection = "client-head"``), logits and labels never leave, and the owner
trains the head itself.  That hides neither the direction of a gradient, which still separates two
classes, nor its norm (:mod:`fedsplit.attacks.labels.leakage`): for that, name a protection of the
gradients beside the head's place, or draw the labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fedsplit.errors import ConfigError, FrameError
from fedsplit.owners.label_recovery import LabelRecovery
from fedsplit.owners.split.output import OutputReader
from fedsplit.privacy.labels.readers import known_evidence, label_evidence
from fedsplit.privacy.labels.table import GradientShield
from fedsplit.tasks import Task, task_type

MAX_RMS = 100.0
"""Bound on the root mean square of a hidden state's coordinates."""


@dataclass(frozen=True)
class Answer:
    """What one step came to.

    Attributes:
        loss: mean over the step's targets (nats).
        weight: number of targets.
        right: of them, predicted rightly; None: nothing is right or wrong.
        gradient: of the mean loss with respect to what came down, same shape; empty in evaluation,
            and of no rows where none leaves.
        head: gradients of the mean loss with respect to the head's trained parameters.
        per_text: (B, 2), each text's own mean loss and share of right predictions (0 where nothing
            is right or wrong); None where no noisy report is made of them.
        sums: the task's additive numbers; empty in training.
    """

    loss: float
    weight: float
    right: int | None
    gradient: Tensor
    head: list[Tensor]
    per_text: Tensor | None = None
    sums: Mapping[str, float] = field(default_factory=dict)


class LabelSide:
    """Holds the labels of a session and computes the loss on them.

    Args:
        reader: reads the server's output; its samples have the labels to train on.
        task: what the labels are and the loss on them; None: classes, or the texts' own tokens.
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
        task: Task | None = None,
        shield: GradientShield | None = None,
        transition: Tensor | None = None,
        protection: Mapping[str, Any] | None = None,
        recovery: LabelRecovery | None = None,
        per_text: bool = False,
        withholds: bool = False,
    ) -> None:
        self.reader = reader
        self.samples = reader.samples
        usual = "causal-lm" if self.samples.labels is None else "sequence-classification"
        self.task = task or task_type(usual)(reader.classes)
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

        What is out of bounds (:meth:`fedsplit.tasks.Task.bounded`, ``MAX_RMS``) is clipped before
        anything is made of it.

        Raises:
            FrameError: fewer numbers in a row of output than the task has.
            PolicyError: the gradients would tell more labels than the owner's rules allow.
        """
        output = values
        values = self._bounded(values)
        values = values.detach().requires_grad_(train)
        parameters = list(self.reader.parameters.values()) if train else []
        with torch.set_grad_enabled(train):
            scores, targets = self._scores(values, slots)
        each = self._each(scores, targets, slots) if self._per_text else None
        sums: dict[str, float] = {}
        if not train:
            parts, about = [self.targets(slot) for slot in slots], self.samples.about(slots)
            sums = self.task.count(scores, targets, parts, about)
            averaged = self.task.averaged(about)
            if averaged is not None:
                own = torch.tensor(averaged).repeat_interleave(torch.tensor(parts))
                scores, targets = scores[own], targets[own]
        with torch.set_grad_enabled(train):
            loss = self._loss(scores, targets, train)
        hits = self.task.right(scores, targets)
        right = None if hits is None else int(hits.sum())
        if not train:
            return Answer(float(loss), float(len(targets)), right, torch.empty(0), [], each, sums)
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
        keep, _ = self.samples.targets_of(slots)
        if keep is None:
            return self._shield(gradient, targets, slots, output)
        if self.samples.words is not None:  # where words begin must not show by rows without noise
            known = torch.zeros(len(gradient), dtype=targets.dtype).index_put((keep,), targets)
            return self._shield(gradient, known, slots, output)
        sent = torch.zeros_like(gradient)  # rows without a target, such as a text's last token
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
        values = self._bounded(values)
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
        tried = None if self.samples.labels is None else self.task.hypotheses(targets)
        if tried is None:
            return None
        if self._shield is None:  # the label that the loss was of stands in the gradient
            return known_evidence(self.task.truth(targets), len(tried))
        found = []
        for other in tried:
            with torch.enable_grad():
                own = values.detach().requires_grad_(True)
                scores, _ = self._scores(own, slots)
                loss = self._loss(scores, other, True)
            found.append(self._flat(torch.autograd.grad(loss, [own])[0], slots))
        return label_evidence(self._flat(sent, slots), torch.stack(found))

    def _flat(self, rows: Tensor, slots: Sequence[int]) -> Tensor:
        """Return each sample's own rows as one row, (B, longest * d)."""
        own = self.reader.rows(rows.detach(), slots)
        return nn.utils.rnn.pad_sequence(list(own), batch_first=True).flatten(1)

    def _each(self, scores: Tensor, targets: Tensor, slots: Sequence[int]) -> Tensor:
        """Return each text's own mean loss and share of right predictions, (B, 2)."""
        with torch.no_grad():
            losses = self.task.losses(scores, targets)
            hits = self.task.right(scores, targets)
            right = torch.zeros_like(losses) if hits is None else hits.to(losses)
            rows = torch.stack([losses, right], dim=1)
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
        return self.samples.target_count(slot)

    def _bounded(self, values: Tensor) -> Tensor:
        """Return what came down within bounds."""
        return self.task.bounded(values) if self.reader.head is None else bounded_hidden(values)

    def _loss(self, scores: Tensor, targets: Tensor, train: bool) -> Tensor:
        if not train:
            return self.task.losses(scores, targets).mean()
        return self.task.loss(scores, targets, self._transition)

    def _scores(self, values: Tensor, slots: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return one row of scores per target, and the targets."""
        scores = self.task.bounded(self.reader.logits(values, slots))
        keep, targets = self.samples.targets_of(slots)
        if keep is not None:
            scores = scores[keep]
        elif scores.shape[1] < self.task.fewest(targets):
            raise FrameError(f"LOGITS with {scores.shape[1]} classes: fewer than labels")
        return scores, targets


def _gradients(loss: Tensor, by: Sequence[Tensor]) -> list[Tensor]:
    """Return the loss's gradients, zeros where it does not depend on a tensor."""
    if not by:
        return []
    found = torch.autograd.grad(loss, list(by), allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(by, found, strict=True)]


def bounded_hidden(hidden: Tensor) -> Tensor:
    """Return hidden states (N, d), each scaled down to a root mean square of ``MAX_RMS`` at most.

    Honest states are returned as they are, bit for bit.
    """
    size = hidden.detach().double().square().mean(1, keepdim=True).sqrt()
    if float(size.max()) <= MAX_RMS:
        return hidden
    return (hidden.double() * (MAX_RMS / size.clamp_min(MAX_RMS))).to(hidden.dtype)
