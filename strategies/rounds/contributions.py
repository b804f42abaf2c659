"""What one owner may contribute to an average, at most: a bounded weight, norm and direction.

Nothing here believes an owner's word.  Weights are cut to a multiple of the round's median, changes
scaled down to a multiple of the round's median norm (as FLAME does, arXiv 2101.02281, algorithm 1),
a change that points against the others' is left out, and changes that are more alike than the
round's others weigh together about as much as one (the idea of FoolsGold, arXiv 1808.04866, with
the round's own likeness as the measure).  All four are relative to the owners of the same round, so
the guarantee needs an honest majority among them:

    with f of n owners lying, the honest ones of equal weight and the plain mean, what liars add is
    at most ``f cap clip / (n - f + f cap)`` times the largest honest norm, whatever they send.

What breaks it: colluders that are half of the round or more; and changes of honest norm, weight and
direction that are no more alike than honest ones, such as a backdoor trained in by one owner, or by
several that add noise of their own.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from flwr.app import Message

from fedsplit.config import RobustConfig
from fedsplit.wire.messages import WEIGHTS, weights_record

NDArray: TypeAlias = np.ndarray[Any, Any]
Arrays: TypeAlias = Mapping[str, NDArray]

COUNTS = ("targets", "num-examples")  # numbers that weigh an owner in Flower's averages
FEWEST = 4
"""Owners of a round at least for any of them to be called an outlier: of three, one liar and one
honest owner say as much as each other."""
BLATANT = 10.0
"""Times the round's median beyond which a norm or a count is held against its owner."""
OPPOSED = -0.5
"""Times the median agreement at or below which a change points against the others' ..."""
DEVIATIONS = 5.0
"""... and standard deviations below the median at least.  The deviation is the round's own (by the
median absolute one), or that of a random direction's cosine, 1 / sqrt(weights), if that is more.
Nobody was that far off in 6,000 honest rounds drawn by a test (4 to 30 owners, pairwise cosines of
0 to 0.64): at most 5 false alarms in 10,000 rounds with 95 % confidence, under that model."""

LEAST_SPREAD = 0.02
"""Spread of cosines at least: equal owners' need not be told apart more finely."""
PIECE = 1 << 22
"""Weights of all owners together that are compared at once."""


@dataclass
class Contribution:
    """What became of one owner's change.

    Attributes:
        norm: its L2 norm.
        times: the norm in units of the round's median.
        share: what was kept of it: 1 = all, 0 = nothing.
        weight: its weight as counted.
        weighed: its weight in the average.
        agreement: cosine with the sum of the other owners' directions; None for fewer than two, or
            without ``screen``.
        alike: what its weight was multiplied by for changes like its own; None where none was.
        reason: what is held against the owner; empty for what honest owners do.
    """

    norm: float
    times: float
    share: float = 1.0
    weight: float = 1.0
    weighed: float = 1.0
    agreement: float | None = None
    alike: float | None = None
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return it, JSON-able."""
        return {name: value for name, value in vars(self).items() if value not in (None, "")}


def capped(counts: Mapping[str, float], cap: float) -> dict[str, float]:
    """Return counts of at most ``cap`` times their (lower) median; 0 = as they are."""
    if not cap or not counts:
        return dict(counts)
    most = cap * statistics.median_low(counts.values())
    return {name: min(count, most) for name, count in counts.items()}


def bound_contributions(
    replies: Mapping[str, Message], start: Arrays, config: RobustConfig
) -> dict[str, Contribution]:
    """Bound every owner's weights, norm and direction in place; return what became of each.

    Replies whose ``share`` is 0 are not to be averaged.  Memory is two copies of the weights,
    however many owners there are, and 32 MiB; time is quadratic in the number of owners with
    ``screen`` (n^2 d multiplications for d weights).

    Args:
        replies: by owner, with checked weights and the same metrics each.
        start: what owners began the round with.
        config: the bounds.
    """
    weights = _cap_counts(replies, config.weight_cap)
    norms = {name: _norm(_changes(reply, start)) for name, reply in replies.items()}
    median = statistics.median(norms.values()) if norms else 0.0
    directions: Mapping[str, float] = {}
    opposed: Mapping[str, str] = {}
    alike: Mapping[str, float] = {}
    if config.screen:
        moved, cosines = _cosines(replies, start, norms)
        directions = agreements_of(moved, cosines)
        opposed = find_opposed(directions, weights_of(start))
        alike = likeness_weights(moved, cosines, weights_of(start))
    found: dict[str, Contribution] = {}
    for name, reply in replies.items():
        row = Contribution(norms[name], norms[name] / median if median else float(norms[name] > 0))
        row.weight, row.weighed = weights[name]
        row.agreement = directions.get(name)
        row.share = _share(row, config.clip, median)
        row.reason = "; ".join(_charges(row, weights, len(replies)))
        if name in opposed:
            row.share, row.reason = 0.0, opposed[name]
        elif row.share < 1.0:
            _scale(reply, start, row.share)
        if name in alike:
            row.alike = alike[name]
            row.weighed *= row.alike
            _weigh(reply, row.alike)
        found[name] = row
    return found


def _cap_counts(replies: Mapping[str, Message], cap: float) -> dict[str, tuple[float, float]]:
    """Cap what weighs replies; return (counted, kept) of the first such number of each."""
    found = dict.fromkeys(replies, (1.0, 1.0))
    for key in reversed(COUNTS):
        counts: dict[str, float] = {}
        for name, reply in replies.items():
            for record in reply.content.metric_records.values():
                if isinstance(value := record.get(key), int | float):
                    counts[name] = float(value)
        for name, kept in capped(counts, cap).items():
            for record in replies[name].content.metric_records.values():
                if kept < counts[name]:
                    record[key] = kept
            found[name] = counts[name], kept
    return found


def _changes(reply: Message, start: Arrays) -> dict[str, NDArray]:
    sent = reply.content.array_records[WEIGHTS]
    return {name: sent[name].numpy() - value for name, value in start.items()}


def _norm(changes: Arrays) -> float:
    return float(np.sqrt(sum(float(np.sum(c.astype(np.float64) ** 2)) for c in changes.values())))


def agreements_of(owners: Sequence[str], cosines: NDArray) -> dict[str, float]:
    """Return each change's cosine with the sum of the others' unit vectors; of one owner nothing.

    A row of cosines adds up to what its owner's unit vector has in common with everyone's sum, and
    all rows to that sum's square.

    Args:
        owners: names.
        cosines: of their changes, (n, n).
    """
    if len(owners) < 2:
        return {}
    along = cosines.sum(axis=1) - cosines.diagonal()
    others = cosines.sum() - 2 * along - cosines.diagonal()  # |sum - own|^2
    found = along / np.sqrt(np.maximum(others, 1e-12))
    return dict(zip(owners, found.tolist(), strict=True))


def _cosines(
    replies: Mapping[str, Message], start: Arrays, norms: Mapping[str, float]
) -> tuple[list[str], NDArray]:
    """Return the owners that changed anything and the cosines of their changes: (n, n)."""
    moved = [name for name, norm in norms.items() if norm > 0]
    found = np.zeros((len(moved), len(moved)))
    if not moved:
        return moved, found
    for tensor, begun in start.items():
        flat = begun.reshape(-1)
        sent = [replies[o].content.array_records[WEIGHTS][tensor].numpy().ravel() for o in moved]
        step = max(1, PIECE // len(moved))
        for at in range(0, flat.size, step):
            part = slice(at, at + step)
            rows = [
                (own[part] - flat[part]) / norms[name]
                for own, name in zip(sent, moved, strict=True)
            ]
            piece = np.stack(rows).astype(np.float32)  # (n, step): units, so nothing overflows
            found += piece @ piece.T
    return moved, found


def weights_of(arrays: Arrays) -> int:
    """Return how many numbers arrays hold together."""
    return sum(value.size for value in arrays.values())


def likeness_weights(owners: Sequence[str], cosines: NDArray, weights: int) -> dict[str, float]:
    """Return what the weights of owners whose changes are alike are to be multiplied by.

    The round's own likeness r is the median, over owners, of each one's median cosine to the
    others, and its spread s likewise: with more honest owners than not, both are honest ones'.  Two
    changes are alike if their cosine c is more than ``r + DEVIATIONS s``; an owner's factor is
    ``1 / (1 + sum of (c - r) / (1 - r))`` over those alike to it, so that k equal changes weigh as
    one, and honest owners whose texts are a little alike lose little.

    Args:
        owners: names; of fewer than five nobody is weighed down, since two are no minority.
        cosines: of their changes, (n, n).
        weights: dimensions of a change; random directions' cosines spread by 1 / sqrt(weights).
    """
    count = len(owners)
    if count <= FEWEST:
        return {}
    others = cosines[~np.eye(count, dtype=bool)].reshape(count, count - 1)
    medians = np.median(others, axis=1)
    spreads = 1.4826 * np.median(np.abs(others - medians[:, None]), axis=1)
    usual, spread = float(np.median(medians)), float(np.median(spreads))
    spread = max(spread, LEAST_SPREAD, 1.0 / math.sqrt(max(1, weights)))
    alike = np.where(others > usual + DEVIATIONS * spread, others - usual, 0.0).sum(axis=1)
    factors = 1.0 / (1.0 + alike / max(1.0 - usual, LEAST_SPREAD))
    return {name: float(f) for name, f in zip(owners, factors, strict=True) if f < 1.0}


def _weigh(reply: Message, factor: float) -> None:
    """Multiply what weighs a reply in an average."""
    for record in reply.content.metric_records.values():
        for key in COUNTS:
            if isinstance(value := record.get(key), int | float):
                record[key] = factor * float(value)


def _share(row: Contribution, clip: float, median: float) -> float:
    return min(1.0, clip * median / row.norm) if clip and row.norm > 0 else 1.0


def _charges(
    row: Contribution, weights: Mapping[str, tuple[float, float]], owners: int
) -> list[str]:
    """Return what no honest owner's change or count is like; nothing where few can be compared."""
    if owners < FEWEST:
        return []
    told = []
    if row.times > BLATANT:
        told.append(f"norm of its change is {row.times:.3g} times the round's median")
    median = statistics.median_low(counted for counted, _ in weights.values())
    if row.weight > BLATANT**2 * median:
        told.append(f"its count of targets is {row.weight / median:.3g} times the round's median")
    return told


def find_opposed(agreements: Mapping[str, float], weights: int) -> dict[str, str]:
    """Return the owners whose changes point against the others' -> the reason.

    Args:
        agreements: each owner's cosine with the sum of the other owners' directions.
        weights: dimensions of a change.
    """
    if len(agreements) < FEWEST:
        return {}
    median = statistics.median(agreements.values())
    spread = 1.4826 * statistics.median(abs(a - median) for a in agreements.values())
    spread = max(spread, 1.0 / math.sqrt(max(1, weights)))
    bound = min(OPPOSED * median, median - DEVIATIONS * spread)
    return {
        owner: f"its change points against the others' (cosine {found:.3f}, the round's median "
        f"{median:.3f}, must be > {bound:.3f})"
        for owner, found in agreements.items()
        if median > 0 and found <= bound
    }


def _scale(reply: Message, start: Arrays, share: float) -> None:
    kept = {
        name: (start[name] + share * change.astype(np.float64)).astype(np.float32)
        for name, change in _changes(reply, start).items()
    }
    reply.content[WEIGHTS] = weights_record(kept)
