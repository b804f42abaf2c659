"""What the attacker makes of what left, how it is scored, and what a policy allows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from simulations.adversary.victim import Policy, rule

Guesses = Mapping[int, Sequence[int]]
"""Slot -> guessed token ids, or a guessed label alone."""


@dataclass(frozen=True)
class Row:
    """One attack's outcome.

    Attributes:
        case: 1 to 10, as the threat model's examples are numbered; 11: masked sums; 0: an honest
            session.
        variant: which way.
        read: share of ``targets`` that the server read.
        allowance: share that it may read: guessing, or what the policy's floor allows.
        targets: number of tokens, labels, texts or facts that were there to be read.
        unit: what they are.
        left: bytes of frames that left the owner.
        told: what the owner told of its first refusal; empty where it refused nothing.
    """

    case: int
    variant: str
    read: float
    allowance: float
    targets: int
    unit: str
    left: int = 0
    told: str = ""

    @property
    def ok(self) -> bool:
        """Whether no more was read than is allowed."""
        return self.read <= self.allowance

    def to_dict(self) -> dict[str, Any]:
        """Return the row, JSON-able."""
        return {**asdict(self), "ok": self.ok}


def nearest(
    rows: Tensor, table: Tensor, prior: Tensor | None = None, weight: float = 0.0
) -> Tensor:
    """Return the row of ``table`` nearest to each vector, (T, d) -> (T,).

    Args:
        rows: received.
        table: public vectors (V, d).
        prior: log probability of each (V,); None: none.
        weight: nats per unit of distance, where there is a prior.
    """
    distance = torch.cdist(rows.double(), table.double())
    if prior is None:
        return distance.argmin(1)
    return (prior.double() - weight * distance).argmax(1)


def unigram(ids: Iterable[Sequence[int]], size: int) -> Tensor:
    """Return the smoothed log frequencies of public text's tokens, (V,)."""
    counts = torch.full((size,), 0.1, dtype=torch.float64)
    for row in ids:
        counts += torch.bincount(torch.tensor(list(row)), minlength=size)
    return (counts / counts.sum()).log()


def average(views: Iterable[Mapping[int, Tensor]]) -> dict[int, Tensor]:
    """Return each slot's mean over all its views, as long as the longest; repeats count once.

    Views of different length are of one text cut at different places: position p is averaged over
    the views that reach it.
    """
    seen: dict[int, list[Tensor]] = {}
    for view in views:
        for slot, rows in view.items():
            known = seen.setdefault(slot, [])
            if not any(x.shape == rows.shape and torch.equal(x, rows) for x in known):
                known.append(rows)
    found = {}
    for slot, parts in seen.items():
        longest = max(len(x) for x in parts)
        total = torch.zeros(longest, parts[0].shape[1], dtype=torch.float64)
        count = torch.zeros(longest, 1, dtype=torch.float64)
        for x in parts:
            total[: len(x)] += x.double()
            count[: len(x)] += 1
        found[slot] = (total / count).float()
    return found


def score(guesses: Guesses, truth: Guesses, ignore: Iterable[int] = ()) -> tuple[float, int, float]:
    """Return (share read, targets, share that guessing the commonest target reads).

    Every target counts, whether or not anything was received for it.

    Args:
        guesses: per slot, by position.
        truth: per slot.
        ignore: targets that are not scored (special tokens).
    """
    skip = set(ignore)
    right = total = 0
    common: Counter[int] = Counter()
    for slot, true in truth.items():
        guess = guesses.get(slot, ())
        for at, token in enumerate(true):
            if token in skip:
                continue
            total += 1
            common[token] += 1
            right += at < len(guess) and int(guess[at]) == token
    most = max(common.values(), default=0)
    return right / max(1, total), total, most / max(1, total)


def allowed(policy: Policy, what: str, guess: float, targets: int) -> float:
    """Return the share that may be read: guessing, or the policy's floor, and chance.

    Args:
        policy: the owner's.
        what: ``tokens``, ``labels``, or anything else, which no floor allows.
        guess: share read by whoever sees nothing.
        targets: number of them; three standard errors of the guess are chance.
    """
    floor = rule(policy, "min_empirical_privacy") if what == "tokens" else None
    base = max(guess, 1 - float(floor) if floor is not None else 0.0)
    if what == "labels":
        # Who repeats the drawn label is right as often as randomised response keeps it.
        epsilon = rule(policy, "max_epsilon")
        kept = 1 / (1 + math.exp(-float(epsilon))) if epsilon is not None else 0.0
        base = max(base, float(rule(policy, "max_label_recovery") or kept))
    chance = 3 * math.sqrt(base * (1 - base) / max(1, targets)) if 0 < base < 1 else 0.0
    return min(1.0, base + chance)


def argmin_labels(
    gradients: Mapping[int, Tensor], slots: Mapping[int, Sequence[int]]
) -> dict[int, int]:
    """Return each slot's label: the smallest entry of the first gradient of its logits."""
    found: dict[int, int] = {}
    for step in sorted(gradients):
        for slot, row in zip(slots[step], gradients[step], strict=True):
            found.setdefault(slot, int(row.argmin()))
    return found


Case = Callable[..., list[Row]]
