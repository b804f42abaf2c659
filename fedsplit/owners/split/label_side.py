"""The labels' side of a step: from what the server sends down to a loss and its gradients.

With the head at the server, logits come down and their gradients go up.  With the head here
(U-shape, ``labels.protection = "client-head"``), final hidden states come down, of those positions
alone that the head reads, and their gradients go up; logits and labels never leave, and the owner
trains the head itself.  That hides neither the direction of a gradient, which still separates two
classes, nor its norm (:mod:`fedsplit.attacks.labels.leakage`): for that, name a protection of the
gradients beside the head's place, or draw the labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsplit.errors import ConfigError, FrameError
from fedsplit.models.splitting.heads import Head, positions_read
from fedsplit.owners.samples import Samples
from fedsplit.privacy.labels.table import GradientShield

MAX_CLASSES = 1 << 20


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
    """Holds the labels, and the head where that is the owner's.

    Args:
        samples: the split that this session works on, with the labels to train on.
        head: run without dropout, so that the answer to a repeated frame is the same; None: the
            head is at the server.
        trained: whether the head's parameters are trained (all float ones).
        shield: what is done to the gradients of each step, or None.
        transition: (C, C), row = true label; the loss is corrected for labels drawn with it
            (forward correction, Patrini et al., arXiv 1609.03683); None: no correction.

    Raises:
        ConfigError: gradients are to be shielded, and the head reads several rows per sample.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        head: Head | None = None,
        trained: bool = True,
        shield: GradientShield | None = None,
        transition: Tensor | None = None,
    ) -> None:
        self.samples = samples
        self.head = None if head is None else head.eval()
        self._positions = "all" if head is None else positions_read(head)
        # One row per sample, or one per token?
        self._per_sample = samples.labels is not None and (head is None or self._positions != "all")
        self._shield = shield
        self._transition = transition
        every = head is not None and self._positions == "all"
        if shield is not None and every and not shield.protection.takes_tokens:
            raise ConfigError(
                f"labels.protection with {shield.protection.name}: must have a head that reads one "
                "position per text, or the head at the server"
            )
        self.parameters: dict[str, nn.Parameter] = {}
        if head is not None:
            for parameter in head.parameters():
                parameter.requires_grad_(trained and parameter.is_floating_point())
            self.parameters = {n: p for n, p in head.named_parameters() if p.requires_grad}

    def tokens(self, slots: Sequence[int]) -> int:
        """Return how many tokens the samples have."""
        return sum(int(self.samples.ids[s].shape[0]) for s in slots)

    def check(self, shape: tuple[int, ...], slots: Sequence[int]) -> None:
        """Refuse a shape that does not answer a step on ``slots``.

        Raises:
            FrameError: names what it must be.
        """
        rows = len(slots) if self._per_sample else self.tokens(slots)
        if self.head is not None:
            width = self.head.hidden_size
            if shape != (rows, width):
                raise FrameError(f"LOGITS shape {shape}: must be ({rows}, {width}) hidden states")
            return
        if len(shape) != 2 or shape[0] != rows or not 1 < shape[1] <= MAX_CLASSES:
            raise FrameError(f"LOGITS shape {shape}: must be ({rows}, classes)")

    def answer(self, values: Tensor, slots: Sequence[int], train: bool) -> Answer:
        """Return loss and gradients for what the server sent.

        Args:
            values: logits or hidden states, of the shape that :meth:`check` let pass.
            slots: the step's samples.
            train: whether gradients are wanted.

        Raises:
            FrameError: fewer classes than labels.
        """
        values = values.requires_grad_(train)
        parameters = list(self.parameters.values()) if train else []
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
        own = self._rows_of(values.detach(), slots)[at]
        parameters = list(self.parameters.values())
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

    def _rows_of(self, values: Tensor, slots: Sequence[int]) -> tuple[Tensor, ...]:
        if self._per_sample:
            return torch.split(values, 1)
        return torch.split(values, [int(self.samples.ids[s].shape[0]) for s in slots])

    def _loss(self, scores: Tensor, targets: Tensor, train: bool) -> Tensor:
        if self._transition is None or not train:
            return functional.cross_entropy(scores.float(), targets)
        drawn = scores.float().softmax(dim=1) @ self._transition.float()  # (N, C)
        return functional.nll_loss(drawn.clamp_min(1e-30).log(), targets)

    def _scores(self, values: Tensor, slots: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return one row of scores per target, and the targets."""
        logits = values if self.head is None else self._logits(values, slots)
        if self.samples.labels is None:
            keep, following = self._next_tokens(slots)
            return logits[keep], following
        targets = self.samples.labels[list(slots)]  # (B,)
        if int(targets.max()) >= logits.shape[1]:
            raise FrameError(
                f"LOGITS with {logits.shape[1]} classes: must be > {int(targets.max())}"
            )
        return logits, targets

    def _logits(self, values: Tensor, slots: Sequence[int]) -> Tensor:
        """Run the head: (B, C), or (tokens, V) for language modelling."""
        assert self.head is not None
        if self._positions != "all":
            alone = values[:, None]  # (B, 1, d): to this head, a text of one token
            logits: Tensor = self.head(alone, torch.ones(alone.shape[:2], dtype=torch.int64))
            return logits
        rows = self._rows_of(values, slots)
        hidden = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)  # (B, T, d)
        lengths = torch.tensor([len(r) for r in rows])
        mask = (torch.arange(hidden.shape[1])[None, :] < lengths[:, None]).long()
        logits = self.head(hidden, mask)
        return logits if self.samples.labels is not None else logits[mask.bool()]

    def _next_tokens(self, slots: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the rows that predict something, and what they should predict."""
        keep, following, at = [], [], 0
        for slot in slots:
            ids = self.samples.ids[slot]
            keep.append(torch.arange(at, at + ids.shape[0] - 1))
            following.append(ids[1:])
            at += int(ids.shape[0])
        return torch.cat(keep), torch.cat(following)
