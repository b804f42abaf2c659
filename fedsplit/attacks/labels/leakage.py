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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedsplit.attacks.base import Attack, Truth, View
from fedsplit.attacks.scoring import AttackResult
from fedsplit.errors import AttackError, one_of
from fedsplit.statistics import wilson_interval


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


def labels_from_norm(gradients: Tensor, known: Mapping[int, int]) -> Tensor:
    """Return two-class labels by gradient norm, ``(N, d) -> (N,)``.

    One threshold and its side are fitted to the ``known`` rows (row -> label), at least two.

    Raises:
        AttackError: fewer are known.
    """
    if len(known) < 2:
        raise AttackError(f"known={dict(known)}: must hold at least two rows")
    norms = gradients.norm(dim=1)
    mine = norms[list(known)]
    labels = torch.tensor(list(known.values()))
    best, guess = -1, torch.zeros(len(norms), dtype=torch.int64)
    levels = mine.sort().values
    for threshold in ((levels[1:] + levels[:-1]) / 2).tolist():
        for above in (0, 1):
            found = torch.where(mine >= threshold, above, 1 - above)
            right = int((found == labels).sum())
            if right > best:
                best, guess = right, torch.where(norms >= threshold, above, 1 - above)
    return guess


METHODS: dict[str, tuple[Callable[[Tensor, Mapping[int, int]], Tensor], str]] = {
    "logits": (
        lambda gradients, known: labels_from_logit_gradients(gradients),
        "the returned gradients of the logits",
    ),
    "direction": (
        labels_from_direction,
        "the returned gradients at the cut and the labels of a few rows",
    ),
    "norm": (
        labels_from_norm,
        "the norms of the returned gradients and the labels of a few rows",
    ),
}
"""method -> (gradients, known labels) -> labels; and what it is given."""


@dataclass(frozen=True)
class LabelLeakage(Attack):
    """The attack, scored on the rows whose label was not given.

    Args:
        method: ``"logits"`` (gradients of the logits), or, for two classes and any gradients,
            ``"direction"`` or ``"norm"``.
    """

    name: ClassVar[str] = "label_leakage"
    reads: ClassVar[str] = "labels"
    needs: ClassVar[tuple[str, ...]] = ("gradients",)
    budget: ClassVar[tuple[str, ...]] = ("method",)
    method: str = "logits"

    def __post_init__(self) -> None:
        one_of("method", self.method, METHODS)

    @property
    def knowledge(self) -> str:
        return METHODS[self.method][1]

    def applies(self, view: View) -> bool:
        """Return whether one gradient a sample was received."""
        return super().applies(view) and all(g.dim() == 1 for g in view.gradients)

    def infer(self, gradients: Tensor, known: Mapping[int, int] | None = None) -> Tensor:
        """Return the guessed labels of gradients ``(N, C)`` or ``(N, d)``, ``(N,)``."""
        return METHODS[self.method][0](gradients, known or {})

    def run(self, view: View, truth: Truth) -> AttackResult:
        """Guess, and score.

        Raises:
            AttackError: shapes do not fit, or nothing is left to score.
        """
        self.check(view)
        if any(g.dim() != 1 for g in view.gradients):
            raise AttackError("gradients: must be one row a sample, of its logits or summed")
        n, labels = len(view.gradients), truth.labels
        if labels is None or labels.shape != (n,):
            found = None if labels is None else tuple(labels.shape)
            raise AttackError(f"truth.labels={found}: must be ({n},)")
        start = time.perf_counter()
        guess = self.infer(torch.stack(list(view.gradients)), view.known)
        seconds = time.perf_counter() - start
        scored = torch.ones(n, dtype=torch.bool)
        scored[list(view.known)] = False
        n = int(scored.sum())
        if not n:
            raise AttackError("truth: 0 rows to score: must be >= 1")
        labels = labels.cpu().long()[scored]
        success = float((guess.cpu()[scored] == labels).double().mean())
        return AttackResult(
            name=f"{self.name}:{self.method}",
            success=success,
            interval=wilson_interval(success, n),
            tokens=n,
            baseline=int(torch.bincount(labels).max()) / n,
            knowledge=self.knowledge,
            seconds=seconds,
        )
