"""Owners' updates against a base: one owner's, and the average without each of them.

An average hides a stranger: one of four owners who replaces a block leaves 0.95 of its score
(:mod:`fedsplit.fingerprints.gate.lineage_gate`), so each owner's own update is judged before any
average is made.  Leave-one-out remains for what passes alone and fails together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedsplit.errors import LineageError, ModelError
from fedsplit.fingerprints.gate.lineage_gate import GateConfig, LineageGate, LineageReport, decide
from fedsplit.fingerprints.methods.pcs import Moments, moments

Update = Mapping[str, Tensor]


class Judge(Protocol):
    """What checks a state: a :class:`LineageGate`, or a :class:`MatrixGate` where no block is."""

    def check(
        self, state: Update, changed: Iterable[str] | None = None, *, commit: bool = True
    ) -> LineageReport:
        """Compare a full state with the base."""
        ...


class MatrixGate:
    """The parameter cosine of matrices alone, for a part without any block (embeddings only).

    Weaker than :class:`LineageGate`: an equivalent permutation counts as a stranger here.

    Args:
        base: named tensors.
        config: thresholds.
    """

    def __init__(self, base: Update, config: GateConfig | None = None) -> None:
        self.config = config or GateConfig()
        self.tensors = {n: t.detach().to("cpu", copy=True) for n, t in base.items()}
        self._matrices = [n for n, t in self.tensors.items() if t.dim() >= 2]
        if not self._matrices:
            raise LineageError(f"parameters={len(self.tensors)}: none is a matrix")

    def check(
        self, state: Update, changed: Iterable[str] | None = None, *, commit: bool = True
    ) -> LineageReport:
        """Compare every matrix.

        Raises:
            LineageError: for a missing matrix or another shape.
            ModelError: for NaN or infinite values.
        """
        del changed, commit
        found: list[Moments] = []
        for name, tensor in self.tensors.items():
            if name not in state:
                raise LineageError(f"parameter={name!r}: missing from the state")
            if name in self._matrices:
                found.append(moments(tensor, state[name], name))
            elif not bool(torch.isfinite(state[name]).all()):
                raise ModelError(f"parameter={name!r}: contains NaN or infinite values")
        cosines = tuple(m.cosine() for m in found)
        verdict, diverged = decide(cosines, self.config)
        total = sum(found, Moments(0.0, 0.0, 0.0))
        return LineageReport(
            pcs=total.cosine(),
            ics=None,
            score=sum(cosines) / len(cosines),
            verdict=verdict,
            per_layer=cosines,
            parts={},
            diverged=diverged,
            recomputed=len(cosines),
            notes=("no block: only the matrices' cosines were judged",),
            pcs_per_layer=cosines,
        )


def base_state(gate: LineageGate | MatrixGate) -> dict[str, Tensor]:
    """Return the base's tensors by name, shared, not copied."""
    if isinstance(gate, MatrixGate):
        return dict(gate.tensors)
    return {name: gate.base.get(name) for name in gate.base.names}


def average(updates: Mapping[str, Update], weights: Mapping[str, float]) -> dict[str, Tensor]:
    """Return the weighted mean of the owners' tensors, in float32.

    Raises:
        LineageError: without an owner, for owners with other names than the first one's, or a
            weight that is not positive.
    """
    owners = list(updates)
    if not owners:
        raise LineageError("updates=0: an average needs an owner")
    total = 0.0
    for owner in owners:
        weight = weights[owner]
        if not (math.isfinite(weight) and weight > 0):
            raise LineageError(f"weight of {owner!r}={weight}: must be > 0 and finite")
        if updates[owner].keys() != updates[owners[0]].keys():
            raise LineageError(f"{owner!r}: its tensors are not those of {owners[0]!r}")
        total += weight
    out: dict[str, Tensor] = {}
    for name in updates[owners[0]]:
        mean = torch.zeros_like(updates[owners[0]][name], dtype=torch.float32)
        for owner in owners:
            mean += updates[owner][name].float() * (weights[owner] / total)
        out[name] = mean
    return out


@dataclass(frozen=True)
class LeaveOneOut:
    """What the average would be without each owner.

    Attributes:
        named: the owner without whom it passes; of several the one who costs most; None if nobody's
            absence helps.
        scores: score of the average without each owner.
    """

    named: str | None
    scores: Mapping[str, float]


def leave_one_out(
    gate: Judge, state: Update, updates: Mapping[str, Update], weights: Mapping[str, float]
) -> LeaveOneOut:
    """Find the owner whose absence would have let the average pass.

    Args:
        gate: compares with the base; nothing is committed.
        state: the tensors that owners do not return.
        updates: each owner's tensors.
        weights: each owner's weight in the average.
    """
    scores: dict[str, float] = {}
    passing: list[str] = []
    for owner in updates if len(updates) > 1 else []:
        others = {name: update for name, update in updates.items() if name != owner}
        mean = average(others, weights)
        try:
            found = gate.check({**state, **mean}, mean.keys(), commit=False)
        except (LineageError, ModelError):
            scores[owner] = float("-inf")
            continue
        scores[owner] = found.score
        if found.verdict == "in_lineage":
            passing.append(owner)
    named = max(passing, key=scores.__getitem__) if passing else None
    return LeaveOneOut(named, {n: s for n, s in scores.items() if math.isfinite(s)})
