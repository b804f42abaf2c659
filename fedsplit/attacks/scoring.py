"""How an inversion attack is scored: positional token accuracy, an honest interval, a baseline.

Accuracy counts a token only if it is right at its own position, and only tokens of the text: no
special tokens, no padding.  ("TokAcc" in public code is set overlap: it flatters.)  Tokens of one
sample fall together, so intervals are clustered over samples.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedsplit.errors import AttackError
from fedsplit.seeding import numpy_generator
from fedsplit.statistics import Z95, Floats, auc, wilson_interval

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Inversion:
    """What an inversion attack guesses.

    Args:
        top: per sample, the k best guesses, best first, int64 ``(T_i, k)``.
        seconds: what it took.
        covers: per sample, the positions that the attack reads at all, bool ``(T_i,)``; None: all.
    """

    top: list[Tensor]
    seconds: float
    covers: list[Tensor] | None = None

    @property
    def ids(self) -> list[Tensor]:
        """Per sample, the best guess, int64 ``(T_i,)``."""
        return [x[:, 0] for x in self.top]


@dataclass(frozen=True, kw_only=True)
class AttackResult:
    """An attack's success against the truth.

    Args:
        name: the attack.
        success: share of targets recovered, in [0, 1].
        interval: 95 % interval of ``success``.
        tokens: targets scored.
        baseline: success of guessing the most frequent target everywhere.
        top10: share of targets among the ten best guesses; None if the attack ranks fewer.
        knowledge: what the attacker was given.
        seconds: what the attack took.
        extra: more figures, JSON-able.
        per_text: (tokens recovered, tokens scored) of each text with a scored token.
        guess: success of the guess that stands beside the attack, and the share of texts that it
            gets right from end to end; None: ``baseline`` is the guess.
        detail: what else the attack found, for its own command or experiment.
    """

    name: str
    success: float
    interval: tuple[float, float]
    tokens: int
    baseline: float
    top10: float | None = None
    knowledge: str
    seconds: float
    extra: dict[str, Any] = field(default_factory=dict)
    per_text: tuple[tuple[int, int], ...] = ()
    detail: Any = None
    guess: tuple[float, float] | None = None

    @property
    def text_recovery(self) -> float | None:
        """Share of texts of which every scored token was read; None where tokens are not read."""
        if not self.per_text:
            return None
        return _whole(self.per_text)

    @property
    def text_interval(self) -> tuple[float, float] | None:
        """95 % Wilson interval of :attr:`text_recovery`, over texts."""
        share = self.text_recovery
        return None if share is None else wilson_interval(share, len(self.per_text))

    @property
    def empirical_privacy(self) -> float:
        """1 - success: the share that stayed hidden from this attack, and from this one only."""
        return 1.0 - self.success

    def to_dict(self) -> dict[str, Any]:
        """Return the result, JSON-able."""
        return {
            "name": self.name,
            "success": self.success,
            "empirical_privacy": self.empirical_privacy,
            "interval": list(self.interval),
            "tokens": self.tokens,
            "baseline": self.baseline,
            "top10": self.top10,
            "knowledge": self.knowledge,
            "seconds": self.seconds,
            **self._of_texts(),
            **self.extra,
        }

    def _of_texts(self) -> dict[str, Any]:
        if self.text_interval is None:
            return {}
        found: dict[str, Any] = {"texts": len(self.per_text), "text_recovery": self.text_recovery}
        found["text_interval"] = list(self.text_interval)
        if self.guess is not None:
            found["guess"], found["text_guess"] = self.guess
        return found


def _whole(per_text: Sequence[tuple[int, int]]) -> float:
    return sum(right == of for right, of in per_text) / len(per_text)


def clustered_interval(correct: Floats, total: Floats, z: float = Z95) -> tuple[float, float]:
    """Return Wilson's interval with the number of tokens divided by the design effect.

    The design effect is the ratio estimator's variance over samples divided by the variance if
    tokens were independent (Kish 1965; at least 1 here).  Unlike a bootstrap it keeps a width at
    0 % and 100 %.

    Args:
        correct: tokens recovered per sample, ``(S,)``.
        total: tokens per sample, ``(S,)``.
        z: normal quantile.
    """
    n, samples = float(total.sum()), len(total)
    p = float(correct.sum()) / n
    if samples < 2 or not 0.0 < p < 1.0:
        return wilson_interval(p, n if samples >= 2 else min(n, 1.0), z)
    residual = correct - p * total
    variance = samples / (samples - 1) * float((residual**2).sum()) / (n * n)
    effect = max(1.0, variance / (p * (1 - p) / n))
    return wilson_interval(p, n / effect, z)


def auc_interval(
    scores: Floats, positive: Bools, groups: npt.NDArray[np.int64] | None = None, seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the AUC, over samples or groups."""
    rng = numpy_generator(seed, "attacks", "auc")
    group = np.arange(len(scores)) if groups is None else np.asarray(groups)
    names, group = np.unique(group, return_inverse=True)
    rows = [np.flatnonzero(group == g) for g in range(len(names))] if groups is not None else None
    found = []
    for _ in range(500):
        drawn = rng.integers(0, len(names), len(names))
        at = drawn if rows is None else np.concatenate([rows[g] for g in drawn])
        if positive[at].all() or not positive[at].any():
            continue
        found.append(auc(scores[at][positive[at]], scores[at][~positive[at]]))
    low, high = np.quantile(found, [0.025, 0.975]) if found else (0.0, 1.0)
    return float(low), float(high)


def score_tokens(
    name: str,
    inversion: Inversion,
    truth: Sequence[Tensor],
    *,
    special_ids: Collection[int] = (),
    knowledge: str = "",
    extra: dict[str, Any] | None = None,
    guess: Sequence[Tensor] | None = None,
) -> AttackResult:
    """Score guesses by positional token accuracy.

    Args:
        name: the attack.
        inversion: its guesses.
        truth: per sample, the true ids ``(T_i,)``.
        special_ids: ids whose positions are not scored (CLS, SEP, padding ...).
        knowledge: what the attacker was given.
        extra: more entries for ``to_dict``.
        guess: per sample, what is guessed without the attack ``(T_i,)``.

    Raises:
        AttackError: if shapes do not fit or no position is left to score.
    """
    if len(inversion.ids) != len(truth):
        raise AttackError(f"guesses={len(inversion.ids)}: must be as many as truth ({len(truth)})")
    special = torch.tensor(sorted(special_ids), dtype=torch.int64)
    hits, totals, top_hits, kept, guessed = [], [], [], [], []
    rank = min((int(t.shape[1]) for t in inversion.top), default=0)
    for i, (found, top, true) in enumerate(zip(inversion.ids, inversion.top, truth, strict=True)):
        if found.shape != true.shape:
            raise AttackError(f"guesses[{i}]={tuple(found.shape)}: must be {tuple(true.shape)}")
        true = true.cpu().to(torch.int64)
        scored = ~torch.isin(true, special)
        if inversion.covers is not None:
            scored &= inversion.covers[i]
        right = (found.cpu() == true)[scored]
        hits.append(int(right.sum()))
        totals.append(int(scored.sum()))
        in_top = (top[:, :10].cpu() == true.unsqueeze(1)).any(1)  # (T, k) -> (T,)
        top_hits.append(int(in_top[scored].sum()))
        kept.append(true[scored])
        if guess is not None:
            guessed.append(int((guess[i].cpu() == true)[scored].sum()))
    use = np.asarray(totals) > 0
    if not use.any():
        raise AttackError("truth: 0 tokens besides special ones: must be >= 1")
    correct = np.asarray(hits, dtype=np.float64)[use]
    total = np.asarray(totals, dtype=np.float64)[use]
    counts = torch.bincount(torch.cat(kept))
    n = int(total.sum())
    beside = [(g, of) for g, of in zip(guessed, totals, strict=False) if of]
    return AttackResult(
        name=name,
        success=float(correct.sum() / n),
        interval=clustered_interval(correct, total),
        tokens=n,
        baseline=int(counts.max()) / n,
        top10=sum(top_hits) / n if rank >= 10 else None,
        knowledge=knowledge,
        seconds=inversion.seconds,
        extra=dict(extra or {}),
        per_text=tuple((h, n) for h, n in zip(hits, totals, strict=True) if n),
        guess=(sum(g for g, _ in beside) / n, _whole(beside)) if guess is not None else None,
    )
