"""Averaging repeated views of one sample: what fresh noise in every epoch would give away.

The mean of v independent draws has its error divided by sqrt(v), so an owner
that draws anew each epoch spends its privacy v times.  fedsplit draws once per sample
(:mod:`fedsplit.privacy.perturb`): every view is the same bytes, and this attack gains nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from fedsplit.attacks.base import View
from fedsplit.attacks.inversion.nearest import CandidateAttack
from fedsplit.attacks.scoring import Inversion
from fedsplit.errors import AttackError
from fedsplit.privacy.denoising.candidate_search import search
from fedsplit.privacy.denoising.candidates import Candidates
from fedsplit.privacy.mechanisms.base import Mechanism
from fedsplit.privacy.mechanisms.calibration import CalibrationInputs
from fedsplit.privacy.secret import SecretStream


@dataclass(frozen=True, kw_only=True)
class MeanOfViews(Mechanism):
    """The law of the mean of several independent draws, as an attacker uses it.

    The likelihood is that of one draw shortened by sqrt(views): exact for Gaussian noise, and for
    d_chi noise in many dimensions, where both are a sphere of nearly one radius.

    Args:
        of: one draw's mechanism.
        views: number of draws.
    """

    name: ClassVar[str] = "mean of views"
    of: Mechanism
    views: int

    @classmethod
    def from_settings(cls, inputs: CalibrationInputs) -> Self:
        """Raise: nobody sends means."""
        raise AttackError("mean of views: no setting asks for it")

    def privatise(
        self, hidden: Tensor, stream: SecretStream, scale: Tensor | None = None
    ) -> Tensor:
        """Return the mean of ``views`` draws, one after the other from ``stream``."""
        drawn = [self.of.privatise(hidden, stream, scale).double() for _ in range(self.views)]
        return torch.stack(drawn).mean(0).to(hidden.dtype)

    def log_likelihood(self, squared: Tensor) -> Tensor:
        """See :meth:`Mechanism.log_likelihood`."""
        return self.of.log_likelihood(squared * self.views)

    def whitener(self) -> Tensor | None:
        """See :meth:`Mechanism.whitener`."""
        return self.of.whitener()

    @property
    def sent_norm(self) -> float:
        """See :meth:`Mechanism.sent_norm`."""
        return self.of.sent_norm

    def guarantee(self, views: int = 1) -> str:
        """See :meth:`Mechanism.guarantee`."""
        return self.of.guarantee(views * self.views)

    def per_token_epsilon(self, distance: float, views: int = 1) -> float:
        """See :meth:`Mechanism.per_token_epsilon`."""
        return self.of.per_token_epsilon(distance, views * self.views)


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
