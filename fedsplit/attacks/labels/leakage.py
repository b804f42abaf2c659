"""Reading private labels off the gradients that train the other party's half.

Labels "stay with the owner" in split learning, but what the owner returns depends on them:

- dL/dz of cross entropy is (softmax(z) - onehot(y)) / B, so a row's one negative entry is the label
  (Li et al., ICLR 2022, arXiv 2102.08504; also the iDLG observation, arXiv 2001.02610).
- Where the owner keeps the head (U-shape), the gradient at the cut of a two-class problem points to
  one of two opposite directions: (p - y) w for a linear head (direction attack, same paper).

A head at the owner removes the first, not the second; gradient noise or randomised response on the
labels trades utility for it.  Labels are never arguments here except a few ``known`` ones.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedsplit.attacks.scoring import AttackResult, wilson_interval
from fedsplit.errors import AttackError, check


def labels_from_logit_gradients(gradients: Tensor) -> Tensor:
    """Return each row's label, ``(N, C) -> (N,)``: the smallest entry; for C = 1, the sign.

    Raises:
        AttackError: for another shape.
    """
    if gradients.dim() != 2 or gradients.shape[1] < 1:
        raise AttackError(f"gradients.shape={tuple(gradients.shape)}: must be (N, C)")
    if gradients.shape[1] == 1:
        return (gradients[:, 0] < 0).long()
    return gradients.argmin(1)


def labels_from_direction(gradients: Tensor, known: Mapping[int, int]) -> Tensor:
    """Return two-class labels from gradients at the cut.

    Rows are split by the sign of their projection on the first right singular vector; each side
    takes the majority label of the ``known`` rows on it.

    Args:
        gradients: one row per sample, ``(N, d)``; sum over tokens first where there are tokens.
        known: row -> label (0 or 1), at least one: a side guess, or the attacker's own sample.

    Raises:
        AttackError: for another shape, no known label, or labels other than 0 and 1.
    """
    if gradients.dim() != 2 or len(gradients) < 2:
        raise AttackError(f"gradients.shape={tuple(gradients.shape)}: must be (N >= 2, d)")
    if not known or not set(known.values()) <= {0, 1}:
        raise AttackError(f"known={dict(known)}: must hold at least one row with label 0 or 1")
    rows = gradients.double()
    rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-300)  # confident rows are short
    _, _, basis = torch.linalg.svd(rows, full_matrices=False)
    side = (rows @ basis[0] > 0).long()  # (N,)
    vote = sum((1 if int(side[i]) == label else -1) for i, label in known.items())
    guess: Tensor = side if vote >= 0 else 1 - side
    return guess


@dataclass(frozen=True)
class LabelLeakage:
    """The attack, scored.

    Args:
        method: ``"logits"`` (gradients of the logits) or ``"direction"`` (gradients at the cut, two
            classes).
    """

    name: ClassVar[str] = "label_leakage"
    budget: ClassVar[tuple[str, ...]] = ()
    method: str = "logits"

    def __post_init__(self) -> None:
        check(self.method in {"logits", "direction"}, "method", self.method, "logits or direction")

    @property
    def knowledge(self) -> str:
        """What the attacker is given."""
        if self.method == "logits":
            return "the returned gradients of the logits"
        return "the returned gradients at the cut and the labels of a few rows"

    def infer(self, gradients: Tensor, known: Mapping[int, int] | None = None) -> Tensor:
        """Return the guessed labels, ``(N,)``."""
        if self.method == "logits":
            return labels_from_logit_gradients(gradients)
        return labels_from_direction(gradients, known or {})

    def evaluate(
        self, gradients: Tensor, truth: Tensor, known: Mapping[int, int] | None = None
    ) -> AttackResult:
        """Guess, and score on the rows whose label was not given.

        Args:
            gradients: recorded, ``(N, C)`` or ``(N, d)``.
            truth: private labels, ``(N,)``; for scoring alone.
            known: row -> label, given to the attacker.

        Raises:
            AttackError: if shapes do not fit or nothing is left to score.
        """
        if truth.shape != gradients.shape[:1]:
            raise AttackError(f"truth.shape={tuple(truth.shape)}: must be ({len(gradients)},)")
        start = time.perf_counter()
        guess = self.infer(gradients, known)
        seconds = time.perf_counter() - start
        scored = torch.ones(len(truth), dtype=torch.bool)
        scored[list(known or {})] = False
        n = int(scored.sum())
        if not n:
            raise AttackError("truth: 0 rows to score: must be >= 1")
        truth = truth.cpu().long()[scored]
        success = float((guess.cpu()[scored] == truth).double().mean())
        return AttackResult(
            name=f"{self.name}:{self.method}",
            success=success,
            interval=wilson_interval(success, n),
            tokens=n,
            baseline=int(torch.bincount(truth).max()) / n,
            top10=None,
            knowledge=self.knowledge,
            seconds=seconds,
        )
