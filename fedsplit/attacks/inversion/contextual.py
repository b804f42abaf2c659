"""Inversion with a language model: the noise is independent per token, language is not.

The posterior of a whole sentence is a hidden Markov model: emission log p(x_t | e_v) from the
mechanism's public law, transition log P(v | words before) from public text.  Per token only the
``shortlist`` candidates that the unigram posterior likes best are kept, which makes exact
forward-backward (Rabiner 1989, eq. 20-27) cheap.  What is returned per token is the marginal
posterior's order, so its first guess minimises the expected number of wrong tokens.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedsplit.attacks.base import TokenAttack, View
from fedsplit.attacks.inversion.nearest import has_candidates
from fedsplit.attacks.scoring import Inversion
from fedsplit.errors import check
from fedsplit.privacy.denoising.candidates import Candidates
from fedsplit.privacy.denoising.ngram import Floats, Ints, NgramModel
from fedsplit.privacy.denoising.posterior import Touched, posterior_search
from fedsplit.privacy.mechanisms.base import Mechanism


@dataclass(frozen=True)
class ContextualInversion(TokenAttack):
    """The attack: unigram MAP's best candidates, re-read in context.

    Args:
        order: 2 (bigrams) or 3 (trigrams).
        shortlist: candidates kept per token; the cost is shortlist^order per token.
        top_k: guesses ranked per token.
    """

    name: ClassVar[str] = "contextual"
    knows: ClassVar[str] = (
        "white box: the initial bottom (k = 0), the mechanism's law, bigrams and trigrams of "
        "public text"
    )
    budget: ClassVar[tuple[str, ...]] = ("shortlist", "order")
    keys: ClassVar[Mapping[str, tuple[str, int]]] = {"shortlist": ("shortlist", 1)}
    result_key: ClassVar[str] = "contextual_inversion"
    words: ClassVar[str] = "... and which words follow which"
    order: int = 2
    shortlist: int = 64
    top_k: int = 10

    def __post_init__(self) -> None:
        check(self.order in (2, 3), "order", self.order, "2 or 3 (tokens)")
        check(self.shortlist >= 2, "shortlist", self.shortlist, ">= 2 (candidates)")
        check(1 <= self.top_k <= self.shortlist, "top_k", self.top_k, "in 1..shortlist (guesses)")

    def applies(self, view: View) -> bool:
        """Return whether there are candidates and noise of a known law."""
        return super().applies(view) and has_candidates(view) and view.public.noisy

    def read(self, view: View) -> Inversion:
        of = view.public
        candidates = of.candidates(view.rows)
        return self.invert(view.rows, candidates, of.known_mechanism, of.language, of.touched)

    def invert(
        self,
        representations: Sequence[Tensor],
        candidates: Candidates,
        mechanism: Mechanism,
        language: NgramModel,
        touched: Touched | None = None,
    ) -> Inversion:
        """Guess the tokens behind ``representations``.

        Args:
            representations: what was received, per sample ``(T_i, d)``.
            candidates: public vectors of every token.
            mechanism: its public law.
            language: from public text.
            touched: reduced noise on some tokens (CTI), as announced; None if there is none.

        Raises:
            PrivacyError: if the mechanism's law is not known.
        """
        start = time.perf_counter()
        prior = torch.from_numpy(language.unigram(np.arange(candidates.vocab_size))).float()
        ids, scores = posterior_search(
            representations, candidates, mechanism, self.shortlist, prior, touched
        )
        top = []
        for tokens, score in zip(ids, scores, strict=True):
            emission = (score.cpu().double() - prior[tokens.cpu()].double()).numpy()  # (T, n)
            ranked = self._read(tokens.cpu().numpy(), emission, language)
            top.append(torch.from_numpy(ranked))
        return Inversion(top, time.perf_counter() - start)

    def _read(self, tokens: Ints, emission: Floats, language: NgramModel) -> Ints:
        """Return each token's best guesses, ``(T, n), (T, n) -> (T, top_k)``."""
        read = marginals if self.order == 2 else trigram_marginals
        log = read(tokens, emission, language)
        order = np.argsort(-log, axis=1, kind="stable")[:, : self.top_k]
        return np.asarray(np.take_along_axis(tokens, order, axis=1), dtype=np.int64)


def _logsumexp(values: Floats, axis: int) -> Floats:
    """Return log sum exp along an axis; scipy's takes many times as long for arrays this small."""
    most = values.max(axis=axis, keepdims=True)
    most = np.where(np.isfinite(most), most, 0.0)  # nothing is possible: the sum is 0
    with np.errstate(divide="ignore"):
        summed = np.log(np.exp(values - most).sum(axis=axis))
    return np.asarray(summed + most.squeeze(axis), dtype=np.float64)


def marginals(tokens: Ints, emission: Floats, language: NgramModel) -> Floats:
    """Return log marginal posteriors under bigrams, ``(T, n)``, up to a constant per row.

    Args:
        tokens: candidate ids, ``(T, n)``.
        emission: log p(x_t | candidate), ``(T, n)``.
        language: the prior.
    """
    steps = [
        language.bigram(tokens[t - 1][:, None], tokens[t][None, :])  # (n, n)
        for t in range(1, len(tokens))
    ]
    forward = np.empty_like(emission)
    forward[0] = emission[0] + language.unigram(tokens[0])
    for t, step in enumerate(steps, start=1):
        forward[t] = emission[t] + _logsumexp(forward[t - 1][:, None] + step, axis=0)
    backward = np.zeros_like(emission)
    for t in range(len(tokens) - 2, -1, -1):
        ahead = emission[t + 1] + backward[t + 1]
        backward[t] = _logsumexp(steps[t] + ahead[None, :], axis=1)
    return np.asarray(forward + backward, dtype=np.float64)


def trigram_marginals(tokens: Ints, emission: Floats, language: NgramModel) -> Floats:
    """Return log marginal posteriors under trigrams; arguments as in :func:`marginals`.

    The chain's states are pairs of neighbours, so a step costs n^3.
    """
    if len(tokens) < 3:
        return marginals(tokens, emission, language)
    pairs = [  # pairs[t][i, j]: forward mass of candidates i at t - 1 and j at t
        emission[0][:, None]
        + language.unigram(tokens[0])[:, None]
        + language.bigram(tokens[0][:, None], tokens[1][None, :])
        + emission[1][None, :]
    ]
    steps = []
    for t in range(2, len(tokens)):
        step = language.trigram(
            tokens[t - 2][:, None, None], tokens[t - 1][None, :, None], tokens[t][None, None, :]
        )  # (n, n, n)
        steps.append(step)
        pairs.append(_logsumexp(pairs[-1][:, :, None] + step, axis=0) + emission[t][None, :])
    out = np.empty_like(emission)
    behind = np.zeros_like(pairs[-1])  # backward mass of the pair (t - 1, t)
    for t in range(len(tokens) - 1, 0, -1):
        both = pairs[t - 1] + behind
        out[t] = _logsumexp(both, axis=0)
        if t == 1:
            out[0] = _logsumexp(both, axis=1)
            break
        ahead = steps[t - 2] + (emission[t][None, :] + behind)[None, :, :]  # (n, n, n)
        behind = _logsumexp(ahead, axis=2)
    return np.asarray(out, dtype=np.float64)
