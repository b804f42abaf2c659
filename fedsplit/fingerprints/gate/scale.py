"""What the lineage score is blind to: norms and scales, of every tensor that can have changed.

The score compares directions of products, so a tensor times a thousand scores 1.  Here each tensor
T is compared with a reference R (the base's, or where the base has none the one that training began
with; and the last accepted round's) by two numbers, with rho a size below which a weight counts as
zero:

    growth = |log(|T| / |R|)|,   change = |T - R| / |R|,   |X| = sqrt(|X|_2^2 + n rho^2)

``growth`` sees a scale, up or down, ``change`` also a sign or another direction.  The null
hypothesis is honest tuning; :data:`BOUNDS` lie between what that reached and what attacks must do
(docs/lineage.md has the figures and the rate of false alarms, from 100 honest rounds).

What breaks it: a change inside the bounds.  A tensor that is honest in size and direction is honest
here, a small backdoor too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsplit.errors import ModelError

FLOOR = 0.1
"""rho of a matrix of the base, in units of the median root mean square of its matrices; of vectors,
and of tensors that the base has not, which may begin at zero, ten times that."""
BOUNDS: Mapping[str, Mapping[str, float]] = {
    "base": {"growth": 1.0, "change": 1.5},
    "last": {"growth": 0.5, "change": 1.0},
}
"""Reference -> number -> the largest that passes.

A tensor that is turned around has a change of 2, one times 3 a growth of 1.1, an independent one of
the same norm a change of 1.4.  Tuning at sensible rates stays below a tenth of each bound, at ten
times the rate below all of them (docs/lineage.md)."""


@dataclass(frozen=True)
class ScaleReport:
    """What a check of sizes found.

    Attributes:
        worst: the largest growth and change since the base and since the last round, such as
            ``growth-since-base``, each with its tensor.
        failed: one sentence per number out of bounds; empty where all passed.
    """

    worst: Mapping[str, tuple[float, str]]
    failed: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return it, JSON-able."""
        return {name: {"value": v, "tensor": tensor} for name, (v, tensor) in self.worst.items()}


class ScaleGate:
    """Compares every tensor that training may change with the base's, and with the last round's.

    Args:
        base: tensors by name, of the base and of what training adds to it, as they begin; held, not
            copied.
        added: names of those that the base itself has not.
        slack: what the bounds are multiplied by.
    """

    def __init__(
        self,
        base: Mapping[str, Tensor],
        added: frozenset[str] = frozenset(),
        slack: float = 1.0,
    ) -> None:
        self._slack = slack
        self._base = dict(base)
        sizes = [
            float(t.detach().float().square().mean().sqrt())
            for name, t in base.items()
            if t.dim() >= 2 and name not in added
        ]
        usual = float(torch.tensor(sizes).median()) if sizes else 0.02  # an initialisation's
        small = {n for n, t in base.items() if n in added or t.dim() < 2}
        self._floors = {n: usual * FLOOR * (10.0 if n in small else 1.0) for n in base}
        self._last: dict[str, Tensor] = {}

    def check(self, update: Mapping[str, Tensor]) -> ScaleReport:
        """Compare every tensor of ``update``.

        Args:
            update: tensors by name.

        Raises:
            ModelError: a name without a reference, or a value that is not finite.
        """
        worst: dict[str, tuple[float, str]] = {}
        for name, tensor in update.items():
            if name not in self._base:
                raise ModelError(f"parameter={name!r}: nothing to compare it with")
            references = {"base": self._base[name], "last": self._last.get(name)}
            for since, reference in references.items():
                if reference is None:
                    continue
                found = compare(tensor, reference, self._floors[name])
                for kind, value in zip(("growth", "change"), found, strict=True):
                    key = f"{kind}-since-{since}"
                    if not math.isfinite(value):
                        raise ModelError(f"parameter={name!r}: contains NaN or infinite values")
                    if key not in worst or value > worst[key][0]:
                        worst[key] = value, name
        failed = []
        for key, (value, name) in worst.items():
            kind, since = key.split("-since-")
            bound = BOUNDS[since][kind] * self._slack
            if value > bound:
                failed.append(
                    f"{name}: {kind} since the {since if since == 'base' else 'last round'} is "
                    f"{value:.3g}, must be <= {bound:.3g}"
                )
        return ScaleReport(worst, tuple(failed))

    def accept(self, update: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take tensors, which are held, as the last round's; return those that were."""
        before = dict(self._last)
        self._last = dict(update)
        return before


def compare(tensor: Tensor, reference: Tensor, floor: float) -> tuple[float, float]:
    """Return (growth, change) of a tensor since a reference of the same shape."""
    ours, theirs = tensor.detach().double().cpu(), reference.detach().double().cpu()
    least = theirs.numel() * floor**2
    size = math.sqrt(float(ours.square().sum()) + least)
    before = math.sqrt(float(theirs.square().sum()) + least)
    if before == 0 or size == 0:  # nothing that could be a scale
        return 0.0, 0.0
    return abs(math.log(size / before)), float((ours - theirs).norm()) / before
