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
from torch import Tensor
from torch.nn import functional

from fedsplit.errors import ConfigError, FrameError
from fedsplit.owners.split.output import OutputReader
from fedsplit.privacy.labels.table import GradientShield


@dataclass(frozen=True)
class Answer:
    """What one step came to.

    Attributes:
        loss: mean over the step's targets (nats).
        weight: number of targets.
        right: of them, predicted rightly.
        gradient: of the mean loss with respect to what came down, same shape; empty in evaluation.
        head: gradients of the mean loss with respect to the head's trained parameters.
    """

    loss: float
    weight: float
    right: int
    gradient: Tensor
    head: list[Tensor]


class LabelSide:
    """Holds the labels of a session and computes the loss on them.

    Args:
        reader: reads the server's output; its samples have the labels to train on.
        shield: what is done to the gradients of each step, or None.
        transition: (C, C), row = true label; the loss is corrected for labels drawn with it
            (forward correction, Patrini et al., arXiv 1609.03683); None: no correction.
        protection: the label protection in force, by its settings, for the ledger.

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
    ) -> None:
        self.reader = reader
        self.samples = reader.samples
        self.protection = dict(protection or {})
        self._shield = shield
        self._transition = transition
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

        Raises:
            FrameError: fewer classes than labels.
        """
        values = values.requires_grad_(train)
        parameters = list(self.reader.parameters.values()) if train else []
        with torch.set_grad_enabled(train):
            scores, targets = self._scores(values, slots)
            loss = self._loss(scores, targets, train)
        right = int((scores.argmax(dim=1) == targets).sum())
        if not train:
            return Answer(float(loss), float(len(targets)), right, torch.empty(0), [])
        gradient, *rest = torch.autograd.grad(loss, [values, *parameters], allow_unused=True)
        if self._shield is not None:
            gradient = self._shield(gradient, targets, slots)
        head = [
            torch.zeros_like(p) if g is None else g for p, g in zip(parameters, rest, strict=True)
        ]
        return Answer(float(loss.detach()), float(len(targets)), right, gradient, head)

    def sample_gradients(self, values: Tensor, slots: Sequence[int], at: int) -> list[Tensor]:
        """Return the head's gradients of one sample's own mean loss, the ``at``-th of ``slots``."""
        own = self.reader.rows(values.detach(), slots)[at]
        parameters = list(self.reader.parameters.values())
        with torch.enable_grad():
            scores, targets = self._scores(own, [slots[at]])
            loss = self._loss(scores, targets, True)
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return [
            torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)
        ]

    def targets(self, slot: int) -> int:
        """Return how many targets one sample has."""
        if self.samples.labels is not None:
            return 1
        return int(self.samples.ids[slot].shape[0]) - 1

    def _loss(self, scores: Tensor, targets: Tensor, train: bool) -> Tensor:
        if self._transition is None or not train:
            return functional.cross_entropy(scores.float(), targets)
        drawn = scores.float().softmax(dim=1) @ self._transition.float()  # (N, C)
        return functional.nll_loss(drawn.clamp_min(1e-30).log(), targets)

    def _scores(self, values: Tensor, slots: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return one row of scores per target, and the targets."""
        logits = self.reader.logits(values, slots)
        if self.samples.labels is None:
            keep, following = self._next_tokens(slots)
            return logits[keep], following
        targets = self.samples.labels[list(slots)]  # (B,)
        if int(targets.max()) >= logits.shape[1]:
            raise FrameError(
                f"LOGITS with {logits.shape[1]} classes: must be > {int(targets.max())}"
            )
        return logits, targets

    def _next_tokens(self, slots: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the rows that predict something, and what they should predict."""
        keep, following, at = [], [], 0
        for slot in slots:
            ids = self.samples.ids[slot]
            keep.append(torch.arange(at, at + ids.shape[0] - 1))
            following.append(ids[1:])
            at += int(ids.shape[0])
        return torch.cat(keep), torch.cat(following)
