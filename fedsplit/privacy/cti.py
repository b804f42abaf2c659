"""Contributing token identification (CTI): the few tokens that carry the task, less noise on them.

Split-and-Privatize, arXiv 2312.15603, section 3.  The paper's exact statistic is not known to us:
``tfidf`` is the published description's usual reading, ``purity`` is ours; compare them on your
data.  On SST-2 ``tfidf`` spends the whole budget on a few frequent words.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedsplit.errors import DataError, check
from fedsplit.privacy.secret import Floats
from fedsplit.registry import pick

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TokenCounts:
    """Counts over an owner's own samples; C classes, V ids (0 for ids never seen)."""

    tokens: Ints  # (C, V) running tokens of id v in class c
    documents: Ints  # (C, V) samples of class c that contain id v
    samples: Ints  # (C,) samples of class c


def count_tokens(
    token_lists: Sequence[Sequence[int]], labels: Sequence[int], special_ids: Collection[int] = ()
) -> tuple[list[int], TokenCounts]:
    """Count tokens per class.

    Args:
        token_lists: one list of token ids per sample.
        labels: one class per sample.
        special_ids: ids to leave out (CLS, SEP, padding ...).

    Returns:
        The sorted classes, and counts whose row i belongs to class i of that list.

    Raises:
        DataError: if the lengths differ, nothing is left, or an id is negative.
    """
    if len(token_lists) != len(labels):
        raise DataError(f"labels={len(labels)}: must be as many as samples ({len(token_lists)})")
    classes = sorted(set(labels))
    row = {label: i for i, label in enumerate(classes)}
    lengths = np.asarray([len(ids) for ids in token_lists], dtype=np.int64)
    parts = [np.asarray(ids, dtype=np.int64) for ids in token_lists]
    flat = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)  # (N,)
    rows = np.asarray([row[label] for label in labels], dtype=np.int64)  # (S,)
    sample = np.repeat(np.arange(len(parts)), lengths)
    use = ~np.isin(flat, np.fromiter(special_ids, dtype=np.int64))
    flat, sample = flat[use], sample[use]
    if not flat.size:
        raise DataError("token_lists: 0 tokens: must hold at least one that is not special")
    if int(flat.min()) < 0:
        raise DataError(f"token_lists: id={int(flat.min())}: must be >= 0")
    width, shape = 1 + int(flat.max()), (len(classes), -1)
    size = len(classes) * width
    tokens = np.bincount(rows[sample] * width + flat, minlength=size).reshape(shape)
    once = np.unique(sample * width + flat)  # one per (sample, id)
    documents = np.bincount(rows[once // width] * width + once % width, minlength=size)
    documents = documents.reshape(shape)
    count = np.bincount(rows, minlength=len(classes))
    return classes, TokenCounts(tokens=tokens, documents=documents, samples=count)


def tfidf(counts: TokenCounts) -> Floats:
    """Score by term frequency in the class times inverse document frequency, ``(C, V)``.

    importance(t, c) = n_tc / sum_t' n_t'c * log(N / (1 + df_t)).  Prefers frequent words, and does
    not look at whether a word separates the classes.  The default is ours (formula not published).
    """
    frequency = counts.tokens / np.maximum(counts.tokens.sum(axis=1, keepdims=True), 1)
    n, df = counts.samples.sum(), counts.documents.sum(axis=0)
    return np.asarray(frequency * np.log(n / (1.0 + df)), dtype=np.float64)


def purity(counts: TokenCounts) -> Floats:
    """Score by how surely a token means its class, ``(C, V)``.

    The lower end of the 95 % Wilson interval of P(class | sample contains t), minus the class's
    share of all samples: evidence per occurrence, which is what a budget of running tokens should
    buy.  A word seen once is never certain; a word seen in both classes scores below zero.
    """
    z = 1.959963984540054
    n = np.maximum(counts.documents.sum(axis=0), 1)  # (V,)
    p = counts.documents / n  # (C, V)
    centre = p + z * z / (2 * n)
    half = z * np.sqrt(p * (1 - p) / n + z * z / (4.0 * n * n))
    lower = (centre - half) / (1 + z * z / n)
    prior = counts.samples / counts.samples.sum()
    return np.asarray(lower - prior[:, None], dtype=np.float64)


STATISTICS: dict[str, Callable[[TokenCounts], Floats]] = {"tfidf": tfidf, "purity": purity}


@dataclass(frozen=True)
class ContributingTokens:
    """The selected tokens, and what selecting them costs.

    Args:
        statistic: the row of ``STATISTICS`` that chose them.
        per_class: class -> list of (token id, score), best first.
        running_share: share of the running (non-special) tokens that are touched.
        vocabulary_share: share of the distinct (non-special) ids seen that are selected.
    """

    statistic: str
    per_class: dict[int, list[tuple[int, float]]]
    running_share: float
    vocabulary_share: float

    @property
    def token_ids(self) -> frozenset[int]:
        """All selected ids."""
        return frozenset(t for row in self.per_class.values() for t, _ in row)

    def multipliers(self, token_ids: Tensor, rho: float) -> Tensor:
        """Return the noise multiplier of each token.

        Args:
            token_ids: integer, any shape.
            rho: multiplier of selected tokens, in [0, 1].

        Returns:
            float64, same shape: ``rho`` at selected tokens, 1 elsewhere.

        Raises:
            ConfigError: if ``rho`` is out of range.
        """
        check(0.0 <= rho <= 1.0, "rho", rho, "within [0, 1] (noise multiplier)")
        selected = torch.tensor(sorted(self.token_ids), dtype=torch.int64)
        touched = torch.isin(token_ids.to(torch.int64), selected.to(token_ids.device))
        out = torch.ones(token_ids.shape, dtype=torch.float64, device=token_ids.device)
        return out.masked_fill_(touched, rho)

    def statement(self, rho: float) -> str:
        """Say what the owner gives up, for the owner to read before anything is sent."""
        many = f"{len(self.token_ids)} token types, {100 * self.running_share:.2f} % of running "
        many += f"tokens ({100 * self.vocabulary_share:.2f} % of the vocabulary seen)"
        if rho == 1.0:
            return f"{many}, keep their full noise (rho = 1)."
        lost = (
            "are sent in the clear and have no guarantee"
            if rho == 0.0
            else f"have their noise multiplied by {rho:g}, their privacy parameter by {1 / rho:g}"
        )
        return (
            f"{many}, {lost}.  Which tokens these are was computed from the private labels and is "
            "visible in what is sent: reduced noise reveals that the word tells the class."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the selection, JSON-able."""
        return {
            "statistic": self.statistic,
            "per_class": {str(c): [[t, s] for t, s in row] for c, row in self.per_class.items()},
            "running_share": self.running_share,
            "vocabulary_share": self.vocabulary_share,
        }


def select_contributing_tokens(
    token_lists: Sequence[Sequence[int]],
    labels: Sequence[int],
    *,
    statistic: str = "purity",
    m: int = 100,
    max_share: float = 0.01,
    min_count: int = 5,
    special_ids: Collection[int] = (),
) -> ContributingTokens:
    """Select the tokens that contribute most to telling the classes apart.

    Classes take turns; each offers its best remaining token (at most ``m``, positive score), which
    is taken if the touched running tokens stay within ``max_share``.

    Args:
        token_lists: the owner's own samples, token ids.
        labels: their private classes.
        statistic: row of ``STATISTICS``.
        m: tokens per class at most.
        max_share: cap on the share of running tokens touched, in [0, 1].
        min_count: running occurrences a token needs.
        special_ids: never selected, never counted.

    Raises:
        ConfigError: for an unknown statistic or an option out of range.
        DataError: see :func:`count_tokens`.
    """
    check(m >= 1, "m", m, ">= 1 (tokens per class)")
    check(0.0 <= max_share <= 1.0, "max_share", max_share, "within [0, 1] (running tokens)")
    check(min_count >= 1, "min_count", min_count, ">= 1 (occurrences)")
    score_of = pick(STATISTICS, statistic, "statistic")
    classes, counts = count_tokens(token_lists, labels, special_ids)
    score = score_of(counts)  # (C, V)
    total = counts.tokens.sum(axis=0)  # (V,)
    score = np.where(total >= min_count, score, -np.inf)
    top = np.argsort(-score, axis=1, kind="stable")[:, :m]  # (C, m)
    budget = int(max_share * total.sum())
    chosen: dict[int, list[tuple[int, float]]] = {int(c): [] for c in classes}
    taken: set[int] = set()
    used = 0
    for rank in range(top.shape[1]):
        for i, label in enumerate(classes):
            token = int(top[i, rank])
            value, cost = float(score[i, token]), int(total[token])
            if not value > 0 or token in taken or used + cost > budget:
                continue
            chosen[int(label)].append((token, value))
            taken.add(token)
            used += cost
    return ContributingTokens(
        statistic=statistic,
        per_class=chosen,
        running_share=used / int(total.sum()),
        vocabulary_share=len(taken) / int((total > 0).sum()),
    )
