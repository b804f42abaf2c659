"""A language model from public text, which everyone has: interpolated bigrams and trigrams.

Witten-Bell smoothing (Witten & Bell 1991; Chen & Goodman 1996, section 2.5) with a caution g: a
history seen n times with t distinct followers gives its lower order the weight g t / (n + g t).
g = 1 is theirs; public text is of another field than the owners', so the default is larger.  Counts
are sorted arrays of keys looked up by bisection: no vocabulary-squared table.

Attackers and denoisers share it: :class:`NgramModel` is looked up pair by pair and has trigrams,
:class:`BigramChain` is the same bigrams over the whole vocabulary at once, with text ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse

from fedsplit.errors import ConfigError, check

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]

SMOOTHING = 0.1


class _Text:
    """Public sequences of token ids, counted.

    Raises:
        ConfigError: the vocabulary is too small or too large, or an id is out of range.
    """

    def __init__(self, token_lists: Iterable[Sequence[int]], vocab_size: int) -> None:
        check(vocab_size >= 1, "vocab_size", vocab_size, ">= 1 (tokens)")
        # Trigram keys are a V^2 + b V + c in 63 bits.
        check(vocab_size <= 2_000_000, "vocab_size", vocab_size, "<= 2,000,000 (tokens)")
        self._v = vocab_size
        self.rows = [np.asarray(ids, dtype=np.int64) for ids in token_lists if len(ids)]
        empty = np.zeros(0, dtype=np.int64)
        self.flat: Ints = np.concatenate(self.rows) if self.rows else empty  # (N,)
        if self.flat.size and not (self.flat.min() >= 0 and self.flat.max() < vocab_size):
            raise ConfigError(f"token id={int(self.flat.max())}: must be in 0..{vocab_size - 1}")
        text = np.repeat(np.arange(len(self.rows)), [len(r) for r in self.rows])
        self._together = text[1:] == text[:-1]

    def unigram(self, smoothing: float) -> Floats:
        """Return each token's share, ``smoothing`` added to its count, ``(V,)``."""
        check(smoothing > 0, "smoothing", smoothing, "> 0 (counts)")
        counts = np.bincount(self.flat, minlength=self._v) + float(smoothing)
        return np.asarray(counts / counts.sum(), dtype=np.float64)

    def pairs(self) -> Ints:
        """Return the key a V + b of every two neighbours."""
        keys = self.flat[:-1] * self._v + self.flat[1:]
        return np.asarray(keys[self._together], dtype=np.int64)

    def triples(self) -> Ints:
        """Return the key a V^2 + b V + c of every three neighbours."""
        keys = (self.flat[:-2] * self._v + self.flat[1:-1]) * self._v + self.flat[2:]
        return np.asarray(keys[self._together[1:] & self._together[:-1]], dtype=np.int64)


class NgramModel:
    """log P(token | up to two tokens before it), from public text.

    Args:
        token_lists: public sequences of token ids, special tokens included; never the owners' own.
        vocab_size: V.
        smoothing: count added to every token's own frequency, so that none is impossible.
        caution: g; the less alike public and private text are, the larger.

    Raises:
        ConfigError: if an id is out of range.
    """

    def __init__(
        self,
        token_lists: Iterable[Sequence[int]],
        vocab_size: int,
        *,
        smoothing: float = SMOOTHING,
        caution: float = 16.0,
    ) -> None:
        check(caution > 0, "caution", caution, "> 0 (weight of the lower order)")
        text = _Text(token_lists, vocab_size)
        self.vocab_size = vocab_size
        self.tokens = int(text.flat.size)
        self._unigram = text.unigram(smoothing)  # (V,)
        self._two = _Followers(text.pairs(), vocab_size, caution)
        self._three = _Followers(text.triples(), vocab_size, caution)

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


class BigramChain:
    """A first-order Markov chain over tokens, counted on public text.

    P(v | u) = (c(u, v) + g k_u p(v)) / (c(u) + g k_u), with k_u the number of different followers
    of u (Witten & Bell, 1991, have g = 1) and p the smoothed unigram distribution: what was never
    seen after u is as likely as it is anywhere.  Public text is of another field, so g is large:
    with g = 1 MiniLM's noisy SST-2 vectors were estimated worse than with the unigram prior, with
    16 better.
    A text's first token follows a mark, and a mark follows its last token, so the chain knows that
    texts begin with CLS and end with SEP where they do.

    Args:
        token_lists: public text, one row of ids per text, special tokens included.
        vocab_size: V.
        caution: g; the less alike public and private text are, the larger.

    Raises:
        ConfigError: no text, an id out of range, or ``caution`` not positive.
    """

    def __init__(
        self, token_lists: Sequence[Sequence[int]], vocab_size: int, caution: float = 16.0
    ) -> None:
        check(caution > 0, "caution", caution, "> 0 (weight of the unigrams)")
        text = _Text(token_lists, vocab_size)
        rows, flat = text.rows, text.flat
        check(bool(rows), "public texts", 0, ">= 1")
        self.vocab_size = vocab_size
        self.unigram = text.unigram(SMOOTHING).astype(np.float32)  # (V,)
        before, after = np.divmod(text.pairs(), vocab_size)
        counts = scipy.sparse.coo_matrix(
            (np.ones(len(before), np.float32), (before, after)), shape=(vocab_size, vocab_size)
        ).tocsr()
        ends = np.bincount([x[-1] for x in rows], minlength=vocab_size)
        followers = caution * np.maximum(np.diff(counts.indptr) + (ends > 0), 1)  # g k_u
        total = np.asarray(counts.sum(axis=1)).ravel() + ends + followers
        scale = scipy.sparse.diags((1 / total).astype(np.float32))
        self.counts = (scale @ counts).tocsr()  # (V, V)
        self.counts_t = self.counts.T.tocsr()
        self.backoff = (followers / total).astype(np.float32)  # (V,)
        # A mark is as likely as a text is short: 1 / mean length, where nothing else is known.
        mark = len(rows) / (len(flat) + len(rows))
        self.end = (ends / total + self.backoff * mark).astype(np.float32)  # (V,)
        starts = np.bincount([x[0] for x in rows], minlength=vocab_size).astype(np.float32)
        kinds = max(1, int((starts > 0).sum()))
        start = (starts + kinds * self.unigram) / (len(rows) + kinds)
        self.start: Singles = np.asarray(start, dtype=np.float32)  # (V,)

    def forward(self, weights: Singles) -> Singles:
        """Return sum_u w(u) P(v | u), ``(B, V) -> (B, V)``."""
        out: Singles = (self.counts_t @ weights.T).T
        out += (weights @ self.backoff)[:, None] * self.unigram
        return out

    def backward(self, values: Singles) -> Singles:
        """Return sum_v P(v | u) x(v), ``(B, V) -> (B, V)``."""
        out: Singles = (self.counts @ values.T).T
        out += (values @ self.unigram)[:, None] * self.backoff
        return out
