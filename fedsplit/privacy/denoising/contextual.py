"""The posterior over candidates with a contextual prior: a bigram chain over public text.

A token's neighbours say what it may be.  With a first-order chain as the prior over texts, the
posterior of every token given *all* received vectors of its text is exact by forward-backward
(Baum et al., 1970; Rabiner, Proc. IEEE 1989, section III.A): hidden states are the V candidates,
emissions the mechanism's likelihood.  A transition is a sparse count matrix plus a multiple of the
unigram distribution, so one step costs V + nnz operations per text, little beside the V d of the
distances.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedsplit.errors import check
from fedsplit.privacy.denoising.candidate_search import posterior_, products
from fedsplit.privacy.denoising.candidates import Candidates, Rows, rows_by_position
from fedsplit.privacy.denoising.ngram import BigramChain
from fedsplit.privacy.denoising.position_candidates import AdditiveCandidates, in_coordinates
from fedsplit.privacy.denoising.posterior import Touched, finished, likelihood_of, unwhiten, whiten
from fedsplit.privacy.mechanisms.base import Mechanism

Array = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

MEMORY_BYTES = 112 << 20


class ContextualDenoiser:
    """Posterior means, given the whole text, in place of received vectors.

    Memory is bounded by ``memory_bytes`` beside the candidates: texts go through in groups, and a
    group holds two ``(tokens, V)`` matrices.

    What breaks it:
        What breaks :class:`fedsplit.privacy.denoising.posterior.Denoiser`; and public text that is
        unlike the
        owners': a bigram model of another field misleads more than none where the noise is strong.

    Args:
        candidates: public vectors of every token (k = 0).
        mechanism: what the owners used.
        chain: the prior.
        touched: reduced noise on some tokens, as announced.
        memory_bytes: bound on a group's matrices.

    Raises:
        PrivacyError: if the mechanism's noise distribution is not known.
        ConfigError: if the chain has another vocabulary.
    """

    def __init__(
        self,
        candidates: Candidates,
        mechanism: Mechanism,
        chain: BigramChain,
        touched: Touched | None = None,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        check(
            chain.vocab_size == candidates.vocab_size,
            "chain.vocab_size",
            chain.vocab_size,
            f"{candidates.vocab_size} (that of the candidates)",
        )
        mechanism.log_likelihood(torch.zeros(1))
        self.chain = chain
        self.likelihood = likelihood_of(mechanism, candidates.dim, touched)
        self.whitener = mechanism.whitener()
        self.candidates = (
            candidates if self.whitener is None else in_coordinates(candidates, self.whitener)
        )
        self._rows = max(1, memory_bytes // (8 * candidates.vocab_size))

    @torch.no_grad()
    def __call__(self, representations: Sequence[Tensor]) -> list[Tensor]:
        """Return the posterior mean of each token's vector, per sample ``(T_i, d)``."""
        if not representations:
            return []
        white = whiten(representations, self.whitener)
        out: list[Tensor | None] = [None] * len(white)
        # Longest first: the texts that have a t-th token are then the first ones, for every t.
        order = sorted(range(len(white)), key=lambda i: -white[i].shape[0])
        group: list[int] = []
        tokens = 0
        for index in [*order, -1]:
            size = 0 if index < 0 else white[index].shape[0]
            if group and (index < 0 or tokens + size > self._rows):
                for i, mean in zip(group, self._group([white[i] for i in group]), strict=True):
                    out[i] = mean
                group, tokens = [], 0
            if index >= 0:
                group.append(index)
                tokens += size
        means = [x for x in out if x is not None]
        return unwhiten(means, self.whitener, representations)

    def _group(self, samples: list[Tensor]) -> list[Tensor]:
        """Return the posterior means of samples sorted by length, longest first."""
        rows = rows_by_position(samples, self.candidates)
        likelihood = self._likelihoods(rows)  # (N, V), each row's largest is 1
        lengths = [x.shape[0] for x in samples]
        by_time = _time_major(rows, lengths)
        posterior = smooth(likelihood, by_time, self.chain)
        return rows.split(weighted_means(torch.from_numpy(posterior), rows, self.candidates))

    def _likelihoods(self, rows: Rows) -> Array:
        log = torch.empty(len(rows.rows), self.candidates.vocab_size)
        norms = torch.linalg.vecdot(rows.rows, rows.rows).unsqueeze(1)
        for part in products(rows, self.candidates):
            posterior_(part.scores, norms[part.here], self.likelihood, None, part.first)
            log[part.here, part.first : part.first + part.scores.shape[1]] = part.scores.cpu()
        log -= log.amax(1, keepdim=True)
        found: Array = log.exp_().numpy()
        return found


def _time_major(rows: Rows, lengths: Sequence[int]) -> list[Ints]:
    """Return, per time t, which rows are the t-th tokens of the samples that have one."""
    at = np.empty(len(rows.order), dtype=np.int64)
    at[rows.order.numpy()] = np.arange(len(rows.order))  # token of the flat samples -> row
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    long = np.asarray(lengths)
    return [at[starts[long > t] + t] for t in range(max(lengths, default=0))]


def smooth(likelihood: Array, by_time: list[Ints], chain: BigramChain) -> Array:
    """Return P(token | all received vectors of its text) by forward-backward.

    Args:
        likelihood: p(received | candidate), ``(N, V)``, each row up to a factor; overwritten.
        by_time: per time, rows of the samples that have a token there; samples sorted by length,
            longest first.
        chain: the prior over texts.

    Returns:
        ``(N, V)``, rows sum to 1.
    """
    filtered = np.empty_like(likelihood)
    state: Array = np.zeros((0, chain.vocab_size), np.float32)
    for t, rows in enumerate(by_time):
        prior = chain.start[None] if t == 0 else chain.forward(state[: len(rows)])
        state = prior * likelihood[rows]
        state /= state.sum(1, keepdims=True)
        filtered[rows] = state
    later = np.zeros((0, chain.vocab_size), np.float32)
    for t in range(len(by_time) - 1, -1, -1):
        rows = by_time[t]
        ending = np.broadcast_to(chain.end, (len(rows) - len(later), chain.vocab_size))
        message = np.concatenate([chain.backward(later), ending]) if len(later) else ending
        filtered[rows] *= message
        filtered[rows] /= filtered[rows].sum(1, keepdims=True)
        later = likelihood[rows] * message
        later /= later.max(1, keepdims=True)
    return filtered


def weighted_means(weights: Tensor, rows: Rows, candidates: Candidates) -> Tensor:
    """Return ``sum_v w_v e_v`` for each row, ``(N, V) -> (N, d)``; weights sum to 1."""
    n, d = rows.rows.shape
    mean, gain, shrink = torch.zeros(n, d), torch.zeros(n), torch.ones(n)
    if isinstance(candidates, AdditiveCandidates):
        position = rows.positions()
        for first, stop, table in candidates.tables():
            scales, here = candidates.scales(first, stop), weights[:, first:stop]
            if scales.shrinks is not None:
                shrink -= (here * (1 - scales.shrinks[position])).sum(1)
            part = here * scales.gains[position]
            gain += part.sum(1)
            mean.addmm_(part, table)
    else:
        for first, block in candidates.blocks():
            for p, (start, stop) in enumerate(rows.bounds):
                if start < stop:
                    part = weights[start:stop, first : first + block.shape[1]]
                    mean[start:stop].addmm_(part, block[p])
    return finished(mean, gain, shrink, torch.ones(n), rows, candidates)
