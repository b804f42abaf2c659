"""Averaging repeated views of one sample: what fresh noise in every epoch would give away.

The mean of v independent draws has its error divided by sqrt(v), so an owner
that draws anew each epoch spends its privacy v times.  fedsplit draws once per sample
(:mod:`fedsplit.privacy.perturb`): every view is the same bytes, and this attack gains nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedsplit.attacks.base import View
from fedsplit.attacks.inversion.nearest import CandidateAttack
from fedsplit.attacks.scoring import Inversion
from fedsplit.errors import AttackError
from fedsplit.privacy.denoising.candidate_search import search
from fedsplit.privacy.denoising.candidates import Candidates


def average_views(views: Sequence[Sequence[Tensor]]) -> tuple[list[Tensor], float]:
    """Return each sample's mean over its distinct views, and how many there are on average.

    Repeats of the same bytes are one view: averaging them would change nothing but rounding.

    Args:
        views: per view (epoch, round or run), every sample's received rows ``(T_i, d)``.

    Raises:
        AttackError: if there is no view, or views differ in samples or shapes.
    """
    if not views or not views[0]:
        raise AttackError(f"views={len(views)}: must be >= 1, each with >= 1 samples")
    if any(len(v) != len(views[0]) for v in views):
        raise AttackError(f"views={[len(v) for v in views]}: must hold the same samples")
    means, total = [], 0
    for i, seen in enumerate(zip(*views, strict=True)):
        if any(x.shape != seen[0].shape for x in seen):
            raise AttackError(f"sample {i}: shapes {[tuple(x.shape) for x in seen]}: must be equal")
        distinct: list[Tensor] = []
        for x in seen:
            if not any(torch.equal(x, y) for y in distinct):
                distinct.append(x)
        total += len(distinct)
        means.append(torch.stack([x.double() for x in distinct]).mean(0).float())
    return means, total / len(means)


@dataclass(frozen=True)
class AveragingInversion(CandidateAttack):
    """The attack: the nearest neighbour of each sample's mean view."""

    name: ClassVar[str] = "averaging"
    knows: ClassVar[str] = (
        "white box: the initial bottom (k = 0), and every view of each sample (epochs, runs)"
    )
    needs: ClassVar[tuple[str, ...]] = ("rows", "repeats")

    def read(self, view: View) -> Inversion:
        return self.invert([view.rows, *view.repeats], view.public.candidates(view.rows))

    def invert(self, views: Sequence[Sequence[Tensor]], candidates: Candidates) -> Inversion:
        """Guess the tokens behind samples seen several times; see :func:`average_views`.

        Raises:
            AttackError: see :func:`average_views`.
        """
        start = time.perf_counter()
        means, _ = average_views(views)
        ids, _ = search(means, candidates, self.top_k)
        return Inversion(ids, time.perf_counter() - start)
