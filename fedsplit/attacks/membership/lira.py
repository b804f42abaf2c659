"""Membership inference on a tuned top: was this sample trained on?

- ``loss`` (Yeom et al., CSF 2018, arXiv 1709.01604): members have a smaller loss.
- ``lira`` (Carlini et al., IEEE S&P 2022, arXiv 2112.03570, algorithm 1): shadow tops are trained
  on random halves of a pool that holds the samples; per sample, the confidences of shadows that
  saw it and of those that did not are two Gaussians, and the tuned top's confidence is scored by
  their likelihood ratio.

Success is the area under the ROC curve, for which guessing is 0.5; what matters to one person is
the true-positive rate at a low false-positive rate, which is reported beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedsplit.attacks.base import Attack, Truth, View
from fedsplit.attacks.scoring import AttackResult, Bools, auc_interval
from fedsplit.errors import AttackError, check
from fedsplit.seeding import numpy_generator
from fedsplit.statistics import Floats, auc


def confidence(logits: Tensor, labels: Tensor) -> Floats:
    """Return log(p / (1 - p)) of each sample's true label, ``(N, C), (N,) -> (N,)``.

    Its distribution over shadow models is close to a Gaussian (arXiv 2112.03570, section IV.C).
    """
    log = torch.log_softmax(logits.detach().double(), dim=1)
    own = log.gather(1, labels.long().unsqueeze(1)).squeeze(1)
    others = log.scatter(1, labels.long().unsqueeze(1), -torch.inf).logsumexp(1)
    return (own - others).cpu().numpy()


def shadow_splits(samples: int, shadows: int, seed: int = 0) -> Bools:
    """Return which samples each shadow trains on, ``(shadows, samples)``: half of all, each.

    Every sample is in half of the shadows (and out of the others).

    Raises:
        ConfigError: unless there are at least two shadows, an even number of them.
    """
    check(shadows >= 2 and shadows % 2 == 0, "shadows", shadows, "an even number >= 2")
    rng = numpy_generator(seed, "attacks", "shadows")
    rank = rng.random((shadows, samples)).argsort(axis=0)
    return np.asarray(rank < shadows // 2, dtype=np.bool_)


def train_shadows(
    train: Callable[[Bools, int], Floats], samples: int, shadows: int, seed: int = 0
) -> tuple[Floats, Bools]:
    """Train all shadows and return their confidences and members, both ``(shadows, samples)``.

    Args:
        train: (members (samples,), number of the shadow) -> confidence on every sample, as
            :func:`confidence`; members or not.
        samples: N.
        shadows: the budget.
        seed: of the splits.
    """
    members = shadow_splits(samples, shadows, seed)
    rows = [np.asarray(train(row, i), dtype=np.float64) for i, row in enumerate(members)]
    return np.stack(rows), members


def lira_scores(target: Floats, shadows: Floats, members: Bools) -> Floats:
    """Return the log likelihood ratio of each sample's confidence, member over non-member, (N,).

    Means are per sample; variances are pooled over samples, which needs fewer shadows (the paper's
    choice below 64).

    Raises:
        AttackError: if shapes do not fit.
    """
    if shadows.shape != members.shape or shadows.shape[1:] != target.shape:
        raise AttackError(
            f"shadows={shadows.shape}, members={members.shape}: must be (S, {len(target)}), both"
        )
    inside = np.where(members, shadows, np.nan)
    outside = np.where(members, np.nan, shadows)
    mean_in, mean_out = np.nanmean(inside, axis=0), np.nanmean(outside, axis=0)
    # Unbiased: a mean of few shadows takes up part of the spread.
    few = members.shape[0] // 2
    correct = few / max(1, few - 1)
    var_in = float(np.nanmean((inside - mean_in) ** 2)) * correct + 1e-12
    var_out = float(np.nanmean((outside - mean_out) ** 2)) * correct + 1e-12
    near = -((target - mean_in) ** 2) / (2 * var_in) - 0.5 * np.log(var_in)
    far = -((target - mean_out) ** 2) / (2 * var_out) - 0.5 * np.log(var_out)
    return np.asarray(near - far, dtype=np.float64)


def tpr_at(scores: Floats, positive: Bools, fpr: float) -> float:
    """Return the highest true-positive rate whose false-positive rate is at most ``fpr``."""
    negatives = np.sort(scores[~positive])[::-1]
    allowed = int(fpr * len(negatives))
    bar = negatives[allowed] if allowed < len(negatives) else -np.inf
    return float((scores[positive] > bar).mean())


@dataclass(frozen=True)
class MembershipInference(Attack):
    """The attack, scored.

    Args:
        method: ``"loss"`` or ``"lira"``.
        shadows: shadow tops, see :func:`train_shadows`, for ``lira``.
        seed: of the shadows' splits.
    """

    name: ClassVar[str] = "membership"
    reads: ClassVar[str] = "membership"
    needs: ClassVar[tuple[str, ...]] = ("confidences",)
    budget: ClassVar[tuple[str, ...]] = ("method", "shadows")
    method: str = "loss"
    shadows: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        check(self.method in ("loss", "lira"), "method", self.method, "loss or lira")
        shadow_splits(1, self.shadows)

    @property
    def knowledge(self) -> str:
        if self.method == "loss":
            return "the tuned top's loss on the sample"
        return (
            f"the tuned top's confidence, how it was trained, and a pool with the sample in it to "
            f"train {self.shadows} shadow tops on"
        )

    def run(self, view: View, truth: Truth) -> AttackResult:
        """Score every sample and compare with the truth.

        Raises:
            AttackError: if shapes do not fit, shadows are missing, or there is but one class.
        """
        self.check(view)
        seen = view.confidences
        assert seen is not None, "checked"
        start = time.perf_counter()
        member = np.asarray(truth.members, dtype=np.bool_)
        if seen.target.shape != member.shape or member.all() or not member.any():
            raise AttackError(
                f"members={member.shape}, {int(member.sum())} true: must be {seen.target.shape} "
                "with members and others"
            )
        scores = seen.target
        if self.method == "lira":
            if seen.shadows is None or seen.shadow_members is None:
                raise AttackError("shadows: missing: must be given for method 'lira'")
            scores = lira_scores(seen.target, seen.shadows, seen.shadow_members)
        return AttackResult(
            name=f"{self.name}:{self.method}",
            success=auc(scores[member], scores[~member]),
            interval=auc_interval(scores, member, seed=self.seed),
            tokens=len(scores),
            baseline=0.5,
            knowledge=self.knowledge,
            seconds=time.perf_counter() - start,
            extra={
                "metric": "auc",
                "tpr_at_fpr_1": tpr_at(scores, member, 0.01),
                "tpr_at_fpr_0.1": tpr_at(scores, member, 0.001),
            },
        )
