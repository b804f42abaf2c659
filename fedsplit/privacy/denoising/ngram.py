"""A public language model that every attacker has: interpolated bigrams and trigrams of tokens.

Witten-Bell smoothing (Witten & Bell 1991; Chen & Goodman 1996, section 2.5) with a caution g: a
history seen n times with t distinct followers gives its lower order the weight g t / (n + g t).
g = 1 is theirs; public text is of another field than the owners', so the default is larger.  Counts
are sorted arrays of keys looked up by bisection: no vocabulary-squared table.

The server's denoiser has a chain of its own over the whole vocabulary
(:mod:`fedsplit.privacy.denoising.contextual`); this one also has trigrams, and is looked up pair
by pair.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedsplit.errors import AttackError, check

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class NgramModel:
    """log P(token | up to two tokens before it), from public text.

    Args:
        token_lists: public sequences of token ids, special tokens included; never the owners' own.
        vocab_size: V.
        smoothing: count added to every token's own frequency, so that none is impossible.
        caution: g; the less alike public and private text are, the larger.

    Raises:
        AttackError: if an id is out of range.
    """

    def __init__(
        self,
        token_lists: Iterable[Sequence[int]],
        vocab_size: int,
        *,
        smoothing: float = 0.1,
        caution: float = 16.0,
    ) -> None:
        check(vocab_size >= 1, "vocab_size", vocab_size, ">= 1 (tokens)")
        # Trigram keys are a V^2 + b V + c in 63 bits.
        check(vocab_size <= 2_000_000, "vocab_size", vocab_size, "<= 2,000,000 (tokens)")
        check(smoothing > 0, "smoothing", smoothing, "> 0 (counts)")
        check(caution > 0, "caution", caution, "> 0 (weight of the lower order)")
        self.vocab_size = vocab_size
        rows = [np.asarray(ids, dtype=np.int64) for ids in token_lists if len(ids)]
        flat = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)  # (N,)
        if flat.size and not (flat.min() >= 0 and flat.max() < vocab_size):
            raise AttackError(f"token id={int(flat.max())}: must be in 0..{vocab_size - 1}")
        self.tokens = int(flat.size)
        sample = np.repeat(np.arange(len(rows)), [len(r) for r in rows])
        counts = np.bincount(flat, minlength=vocab_size) + float(smoothing)
        self._unigram = counts / counts.sum()  # (V,)
        pairs = sample[1:] == sample[:-1]
        triples = pairs[1:] & pairs[:-1]
        first, second, third = flat[:-2], flat[1:-1], flat[2:]
        two = flat[:-1] * vocab_size + flat[1:]
        self._two = _Followers(two[pairs], vocab_size, caution)
        self._three = _Followers(
            (first[triples] * vocab_size + second[triples]) * vocab_size + third[triples],
            vocab_size,
            caution,
        )

    def unigram(self, token: Ints) -> Floats:
        """Return log P(token), any shape."""
        return np.asarray(np.log(self._unigram[token]), dtype=np.float64)

    def bigram(self, before: Ints, token: Ints) -> Floats:
        """Return log P(token | before), shapes broadcast."""
        return np.asarray(np.log(self._bigram(before, token)), dtype=np.float64)

    def trigram(self, first: Ints, second: Ints, token: Ints) -> Floats:
        """Return log P(token | first second), shapes broadcast."""
        history = np.asarray(first) * self.vocab_size + second
        lower = self._bigram(second, token)
        return np.asarray(np.log(self._three.interpolate(history, token, lower)), dtype=np.float64)

    def _bigram(self, before: Ints, token: Ints) -> Floats:
        return self._two.interpolate(before, token, self._unigram[token])

    def perplexity(self, token_lists: Iterable[Sequence[int]], order: int = 3) -> float:
        """Return exp of the mean negative log-likelihood of every token but each list's first."""
        total, n = 0.0, 0
        for ids in token_lists:
            x = np.asarray(ids, dtype=np.int64)
            if len(x) < 2:
                continue
            log = [self.bigram(x[:1], x[1:2])] if order > 1 else [self.unigram(x[1:])]
            if order == 2:
                log = [self.bigram(x[:-1], x[1:])]
            elif order >= 3 and len(x) > 2:
                log.append(self.trigram(x[:-2], x[1:-1], x[2:]))
            total -= float(sum(part.sum() for part in log))
            n += len(x) - 1
        return float(np.exp(total / max(n, 1)))


class _Followers:
    """Counts of (history, token), with each history's total and number of distinct followers."""

    def __init__(self, keys: Ints, vocab_size: int, caution: float) -> None:
        self._v, self._caution = vocab_size, caution
        self._keys, self._counts = np.unique(keys, return_counts=True)
        history = self._keys // vocab_size
        self._histories, start = np.unique(history, return_index=True)
        self._kinds = np.diff(np.append(start, len(history)))
        self._totals: Any = np.zeros(0, dtype=np.int64)
        if len(start):
            self._totals = np.add.reduceat(self._counts, start)

    def interpolate(self, history: Ints, token: Ints, lower: Floats) -> Floats:
        """Return (count + g kinds lower) / (total + g kinds); ``lower`` for an unseen history."""
        if not len(self._keys):
            shape = np.broadcast_shapes(np.shape(history), np.shape(token), np.shape(lower))
            return np.broadcast_to(lower, shape)
        history = np.asarray(history)
        at = np.searchsorted(self._histories, history)
        at = np.minimum(at, len(self._histories) - 1)
        known = self._histories[at] == history
        kinds = self._caution * np.where(known, self._kinds[at], 1)
        total = np.where(known, self._totals[at], 0)
        key = history * self._v + token
        place = np.minimum(np.searchsorted(self._keys, key), len(self._keys) - 1)
        count = np.where(self._keys[place] == key, self._counts[place], 0)
        return np.asarray((count + kinds * lower) / (total + kinds), dtype=np.float64)
