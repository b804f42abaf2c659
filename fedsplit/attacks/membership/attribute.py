"""Attribute inference: does what left tell who wrote it?

Split-and-Privatize, arXiv 2312.15603, section 4 (attribute inference attack, AIA): the attacker
knows a private attribute (sex, age group ...) for part of the samples, trains a classifier on their
representations, and reads the attribute of the rest.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from fedsplit.attacks.base import Attack, Truth, View
from fedsplit.attacks.scoring import AttackResult, auc_interval, clustered_interval
from fedsplit.errors import AttackError, check
from fedsplit.seeding import numpy_generator
from fedsplit.statistics import auc


def pool(representations: Sequence[Tensor], pooling: str = "mean") -> Tensor:
    """Return one vector per sample, float32: ``N x (T_i, d) -> (N, d)``, or ``(N, 2 d)``.

    Args:
        representations: per sample ``(T_i, d)``.
        pooling: ``"mean"`` over tokens (which averages independent noise away: the strong choice
            behind a mechanism), or ``"mean_max"``.
    """
    rows = [x.detach().float().cpu() for x in representations]
    if pooling == "mean":
        return torch.stack([x.mean(0) for x in rows])
    return torch.stack([torch.cat([x.mean(0), x.amax(0)]) for x in rows])


def fit_logistic(features: Tensor, target: Tensor, classes: int, l2: float) -> Tensor:
    """Return multinomial logistic regression weights, ``(N, f), (N,) -> (f + 1, C)``.

    Full-batch L-BFGS on the mean cross entropy plus ``l2 / 2`` times the squared weights.
    """
    design = F.pad(features, (0, 1), value=1.0)  # (N, f + 1)
    weight = torch.zeros(design.shape[1], classes, requires_grad=True)
    optimiser: torch.optim.Optimizer = torch.optim.LBFGS(
        [weight], max_iter=100, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        optimiser.zero_grad()
        loss = F.cross_entropy(design @ weight, target) + l2 / 2 * weight[:-1].square().sum()
        torch.autograd.backward(loss)
        return loss.item()

    optimiser.step(closure)
    return weight.detach()


PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)


def choose_penalty(features: Tensor, target: Tensor, held: Tensor, classes: int) -> float:
    """Return the one of ``PENALTIES`` that fits the ``held`` rows ``(N,)`` best."""
    if not bool(held.any()) or bool(held.all()):
        return PENALTIES[1]

    def loss(l2: float) -> float:
        weight = fit_logistic(features[~held], target[~held], classes, l2)
        return F.cross_entropy(
            F.pad(features[held], (0, 1), value=1.0) @ weight, target[held]
        ).item()

    return min(PENALTIES, key=loss)


def group_order(groups: int, seed: int) -> npt.NDArray[np.int64]:
    """Return the order in which groups become known to the attacker."""
    return numpy_generator(seed, "attacks", "attribute").permutation(groups)


def known_part(
    attribute: Sequence[int], groups: Sequence[int | str], share: float, seed: int = 0
) -> dict[int, int]:
    """Return what an attacker knows who has the attribute of part of the people.

    Args:
        attribute: per sample, any integers.
        groups: who wrote each sample; the first groups of :func:`group_order` are known.
        share: of the groups, in (0, 1).
        seed: of the order.

    Raises:
        AttackError: if lengths differ.
        ConfigError: if the share is out of range.
    """
    check(0 < share < 1, "share", share, "in (0, 1)")
    if len(attribute) != len(groups):
        raise AttackError(f"attribute={len(attribute)}: must be {len(groups)}")
    names, group = np.unique(np.asarray([str(g) for g in groups]), return_inverse=True)
    chosen = group_order(len(names), seed)[: round(share * len(names))]
    return {i: int(attribute[i]) for i in np.flatnonzero(np.isin(group, chosen)).tolist()}


@dataclass(frozen=True)
class AttributeInference(Attack):
    """The attack, scored on people it has not seen.

    Args:
        l2: penalty of the classifier; None: the best of ``PENALTIES`` on a fifth of the known
            groups, held out for that.
        pooling: see :func:`pool`.
        seed: of the split.
    """

    name: ClassVar[str] = "attribute"
    reads: ClassVar[str] = "an attribute"
    needs: ClassVar[tuple[str, ...]] = ("rows", "known")
    knows: ClassVar[str] = "what left, and the private attribute of part of the people"
    l2: float | None = None
    pooling: str = "mean"
    seed: int = 0

    def __post_init__(self) -> None:
        check(self.l2 is None or self.l2 >= 0, "l2", self.l2, ">= 0, or None to choose it")
        check(self.pooling in ("mean", "mean_max"), "pooling", self.pooling, "mean or mean_max")

    def run(self, view: View, truth: Truth) -> AttackResult:
        """Train on the samples whose attribute is known, and score on the others.

        Samples of one group (``view.groups``: who wrote them) must be all known or all unknown.

        Raises:
            AttackError: if lengths differ or a side would hold nothing or one class alone.
        """
        self.check(view)
        n = len(view.rows)
        groups = list(view.groups) or list(range(n))
        attribute = truth.labels
        if attribute is None or len(attribute) != n or len(groups) != n:
            found = 0 if attribute is None else len(attribute)
            raise AttackError(f"attribute={found}, groups={len(groups)}: must be {n}")
        start = time.perf_counter()
        names, group = np.unique(np.asarray([str(g) for g in groups]), return_inverse=True)
        known = torch.zeros(n, dtype=torch.bool)
        known[list(view.known)] = True
        values, labels = np.unique(attribute.numpy(), return_inverse=True)
        target = torch.from_numpy(labels)
        seen, rest = target[known], target[~known]
        if not len(rest) or len(torch.bincount(seen).nonzero()) < 2:
            raise AttackError(
                f"known samples={len(seen)}, others={len(rest)}: must hold two classes and one"
            )
        features = pool(view.rows, self.pooling)  # (N, f)
        mean, std = features[known].mean(0), features[known].std(0).clamp(min=1e-6)
        features = (features - mean) / std
        l2 = self.l2
        if l2 is None:
            order = group_order(len(names), self.seed)
            mine = order[np.isin(order, group[known.numpy()])]
            held = torch.from_numpy(np.isin(group, mine[: -(-len(mine) // 5)]))
            l2 = choose_penalty(features[known], seen, held[known], len(values))
        weight = fit_logistic(features[known], seen, len(values), l2)
        logits = F.pad(features[~known], (0, 1), value=1.0) @ weight  # (M, C)
        guess = logits.argmax(1)
        seconds = time.perf_counter() - start
        right = (guess == rest).double().numpy()
        _, cluster = np.unique(group[~known.numpy()], return_inverse=True)
        extra: dict[str, Any] = {"majority": float((rest == rest.mode().values).double().mean())}
        if len(values) == 2 and len(torch.unique(rest)) == 2:
            score = (logits[:, 1] - logits[:, 0]).double().numpy()
            positive = (rest == 1).numpy()
            extra["auc"] = auc(score[positive], score[~positive])
            extra["auc_interval"] = list(auc_interval(score, positive, cluster, self.seed))
        return AttackResult(
            name=self.name,
            success=float(right.mean()),
            interval=clustered_interval(
                np.bincount(cluster, weights=right).astype(np.float64),
                np.bincount(cluster).astype(np.float64),
            ),
            tokens=len(rest),
            baseline=float((rest == seen.mode().values).double().mean()),
            knowledge=self.knowledge,
            seconds=seconds,
            extra=extra,
        )
