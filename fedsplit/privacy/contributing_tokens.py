"""Contributing token identification (CTI): the few tokens that carry the task, less noise on them.

Split-and-Privatize, arXiv 2312.15603, section 3.  The paper's exact statistic is not known to us:
``tfidf`` is the published description's usual reading, the others are ours; compare them on your
data.  On SST-2 ``tfidf`` spends the whole budget on a few frequent words.

``tfidf``, ``purity`` and ``coverage`` read the private labels.  ``public-idf`` and ``frequent`` do
not: they set the owner's text against public text (:class:`PublicCounts`), and serve generation,
where there are no labels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedsplit.config import RunConfig
from fedsplit.errors import ConfigError, DataError, check
from fedsplit.privacy.mechanisms.table import mechanism_type
from fedsplit.privacy.public_text import public_ids, public_texts
from fedsplit.privacy.secret import Floats
from fedsplit.registry import pick
from fedsplit.statistics import wilson_bounds

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


@dataclass(frozen=True)
class PublicCounts:
    """Counts over text that everyone has; V ids."""

    documents: Ints  # (V,) texts that contain id v
    tokens: Ints  # (V,) running tokens
    texts: int

    @classmethod
    def over(cls, token_lists: Sequence[Sequence[int]], width: int) -> PublicCounts:
        """Count the ids below ``width``; texts are rows of token ids."""
        empty = np.zeros(0, dtype=np.int64)
        flat = np.concatenate([np.asarray(x, dtype=np.int64) for x in token_lists] or [empty])
        once = np.concatenate([np.unique(np.asarray(x, np.int64)) for x in token_lists] or [empty])
        tokens = np.bincount(flat[flat < width], minlength=width)
        documents = np.bincount(once[once < width], minlength=width)
        return cls(documents=documents, tokens=tokens, texts=len(token_lists))

    def surprisal(self) -> Floats:
        """Return -log p(v), nats, ``(V,)``, each count increased by 0.1."""
        p = (self.tokens + 0.1) / (self.tokens.sum() + 0.1 * len(self.tokens))
        return np.asarray(-np.log(p), dtype=np.float64)


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
    n = np.maximum(counts.documents.sum(axis=0), 1)  # (V,)
    lower, _ = wilson_bounds(counts.documents / n, n.astype(np.float64))  # (C, V)
    prior = counts.samples / counts.samples.sum()
    return np.asarray(lower - prior[:, None], dtype=np.float64)


def public_idf(counts: TokenCounts, public: PublicCounts) -> Floats:
    """Score by how much commoner a token is here than in public text, without labels: ``(1, V)``.

    (1 + log n_t) log((1 + N) / (1 + df_t)), n_t the owner's occurrences, df_t and N public.  The
    words of the owner's field.  They are what its text is about: touched, they tell the topic.
    """
    n = counts.tokens.sum(axis=0)
    damped = np.where(n > 0, 1 + np.log(np.maximum(n, 1)), 0.0)
    idf = np.log((1.0 + public.texts) / (1.0 + public.documents))
    return np.asarray((damped * idf)[None], dtype=np.float64)


def frequent(counts: TokenCounts, public: PublicCounts) -> Floats:
    """Score by public document frequency, without labels: ``(1, V)``.

    For generation, where every token counts: the commonest tokens carry the least information (a
    token in its place tells -log p(v) nats on average), so what touching them loses is small and
    known beforehand.  Which ones are touched follows from public text and the cap alone.
    """
    return np.asarray((public.documents / max(public.texts, 1))[None], dtype=np.float64)


STATISTICS: dict[str, Callable[[TokenCounts], Floats]] = {
    "tfidf": tfidf,
    "purity": purity,
}
"""Statistics over classes: they read the private labels."""

PUBLIC_STATISTICS: dict[str, Callable[[TokenCounts, PublicCounts], Floats]] = {
    "frequent": frequent,
    "public-idf": public_idf,
}
"""Statistics against public text: no labels."""


@dataclass(frozen=True)
class ContributingTokens:
    """The selected tokens, and what selecting them costs.

    Args:
        statistic: the row of ``STATISTICS`` that chose them.
        per_class: class -> list of (token id, score), best first.
        running_share: share of the running (non-special) tokens that are touched.
        vocabulary_share: share of the distinct (non-special) ids seen that are selected.
        surprisal: mean -log p(v) of the touched running tokens under public text (nats): what one
            of them tells about its place if it is read; None where no public text was used.
    """

    statistic: str
    per_class: dict[int, list[tuple[int, float]]]
    running_share: float
    vocabulary_share: float
    surprisal: float | None = None

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
        if self.statistic not in PUBLIC_STATISTICS:
            return (
                f"{many}, {lost}.  Which tokens these are was computed from the private labels and "
                "is visible in what is sent: reduced noise reveals that the word tells the class."
            )
        tells = (
            "" if self.surprisal is None else f", each telling {self.surprisal:.1f} nats on average"
        )
        if self.statistic == "frequent":
            return (
                f"{many}, {lost}{tells}.  Which tokens these are follows from public text and the "
                "cap, not from the labels; where they stand is visible."
            )
        return (
            f"{many}, {lost}{tells}.  Which tokens these are was computed from the private texts "
            "and public ones, not from the labels: reduced noise reveals that the word is common "
            "in these texts, which is what they are about."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the selection, JSON-able."""
        return {
            "statistic": self.statistic,
            "per_class": {str(c): [[t, s] for t, s in row] for c, row in self.per_class.items()},
            "running_share": self.running_share,
            "vocabulary_share": self.vocabulary_share,
            "surprisal": self.surprisal,
        }


def select_contributing_tokens(
    token_lists: Sequence[Sequence[int]],
    labels: Sequence[int] | None,
    *,
    statistic: str = "purity",
    m: int = 100,
    max_share: float = 0.01,
    min_count: int = 5,
    special_ids: Collection[int] = (),
    public: Sequence[Sequence[int]] = (),
) -> ContributingTokens:
    """Select the tokens that contribute most to telling the classes apart.

    Classes take turns; each takes its best remaining token of positive score with which the touched
    running tokens stay within ``max_share``, up to ``m``.  Statistics without labels know one
    class, 0.

    Args:
        token_lists: the owner's own samples, token ids.
        labels: their private classes; None only for statistics that need none.
        statistic: row of ``STATISTICS`` or ``PUBLIC_STATISTICS``.
        m: tokens per class at most.
        max_share: cap on the share of running tokens touched, in [0, 1].
        min_count: running occurrences a token needs.
        special_ids: never selected, never counted.
        public: token ids of public texts, for ``PUBLIC_STATISTICS``.

    Raises:
        ConfigError: for an unknown statistic or an option out of range, or labels missing.
        DataError: see :func:`count_tokens`; no public text where it is needed.
    """
    check(m >= 1, "m", m, ">= 1 (tokens per class)")
    check(0.0 <= max_share <= 1.0, "max_share", max_share, "within [0, 1] (running tokens)")
    check(min_count >= 1, "min_count", min_count, ">= 1 (occurrences)")
    pick({**STATISTICS, **PUBLIC_STATISTICS}, statistic, "statistic")
    known: PublicCounts | None = None
    if statistic in PUBLIC_STATISTICS:
        if not public:
            raise DataError(f"public texts=0: must be >= 1 for statistic={statistic!r}")
        classes, counts = count_tokens(token_lists, [0] * len(token_lists), special_ids)
        known = PublicCounts.over(public, counts.tokens.shape[1])
        score = PUBLIC_STATISTICS[statistic](counts, known)  # (1, V)
    else:
        if labels is None:
            raise ConfigError(
                f"statistic={statistic!r}: must be one of {', '.join(PUBLIC_STATISTICS)} "
                "where there are no labels"
            )
        classes, counts = count_tokens(token_lists, labels, special_ids)
        score = STATISTICS[statistic](counts)  # (C, V)
    total = counts.tokens.sum(axis=0)  # (V,)
    score = np.where(total >= min_count, score, -np.inf)
    chosen = _take_turns(classes, score, total, m, int(max_share * total.sum()))
    taken = sorted(t for row in chosen.values() for t, _ in row)
    used = int(total[taken].sum())
    nats = None
    if known is not None and used:
        nats = float((known.surprisal()[taken] * total[taken]).sum() / used)
    return ContributingTokens(
        statistic=statistic,
        per_class=chosen,
        running_share=used / int(total.sum()),
        vocabulary_share=len(taken) / int((total > 0).sum()),
        surprisal=nats,
    )


def _take_turns(
    classes: Sequence[int], score: Floats, total: Ints, m: int, budget: int
) -> dict[int, list[tuple[int, float]]]:
    """Let classes take turns to spend ``budget`` running tokens on the best ids that they can."""
    chosen: dict[int, list[tuple[int, float]]] = {int(c): [] for c in classes}
    queues = [iter(row[np.take(s, row) > 0]) for s, row in _ranked(score)]
    taken: set[int] = set()
    open_ = set(range(len(queues)))
    while open_:
        for i in sorted(open_):
            row = chosen[int(classes[i])]
            for token in map(int, queues[i]):
                if token not in taken and int(total[token]) <= budget:
                    row.append((token, float(score[i, token])))
                    taken.add(token)
                    budget -= int(total[token])
                    break
            else:
                open_.discard(i)
            if len(row) == m:
                open_.discard(i)
    return chosen


def _ranked(score: Floats) -> list[tuple[Floats, Ints]]:
    """Return each class's scores and ids, best first."""
    return [(row, np.argsort(-row, kind="stable")) for row in score]


def choose_tokens(
    config: RunConfig, ids: Sequence[Tensor], labels: Tensor | None, tokenizer: Any
) -> ContributingTokens | None:
    """Return an owner's contributing tokens as configured, or None where CTI is off.

    Args:
        config: the run's settings.
        ids: the owner's token ids, ``(T_i,)`` each.
        labels: their private classes, or None.
        tokenizer: for its special tokens, and for public text where the statistic needs it.

    Raises:
        ConfigError: a statistic over labels where there are none.
        DataError: no tokens.
    """
    c = config.privacy
    if c.cti == "off" or not mechanism_type(c).protects():
        return None
    public: list[list[int]] = []
    if c.cti in PUBLIC_STATISTICS:
        # Never a file that the server names: owners read what the interpreter ships, and only the
        # help topics, since every message may start a process that would parse all modules anew.
        texts = public_texts(docstrings=False)
        public = public_ids(tokenizer, texts, config.model.max_tokens)
    return select_contributing_tokens(
        [x.tolist() for x in ids],
        None if labels is None else labels.tolist(),
        statistic=c.cti,
        m=c.cti_per_class,
        max_share=c.cti_max_share,
        special_ids={int(i) for i in tokenizer.all_special_ids},
        public=public,
    )
