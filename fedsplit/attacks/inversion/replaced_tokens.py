"""Inversion of text-to-text mechanisms: which word stood where another one was sent.

What arrives is exact: clean vectors of tokens that replace the true ones.  So the noise's law says
nothing of the vector, but the channel from true to sent token is public, and anyone can play it.
The attacker sends public text through the mechanism and fits a conditional logit model (McFadden
1974) of the sent token r given the true token v,

    log P(r | v) = a . (|e_v - e_r|, |e_v - e_r|^2, |e_r - mean|^2, [r = v]) - log Z(v),

on a random subset of alternatives, which leaves its estimate consistent.  A text is then read as
:mod:`fedsplit.attacks.inversion.contextual` reads one behind noise: a hidden Markov model whose
emissions are this channel's, whose transitions are those of public text.
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
from fedsplit.attacks.inversion.contextual import marginals
from fedsplit.attacks.inversion.nearest import has_candidates
from fedsplit.attacks.scoring import Inversion
from fedsplit.errors import AttackError, check
from fedsplit.privacy.denoising.candidate_search import search
from fedsplit.privacy.denoising.ngram import NgramModel
from fedsplit.privacy.mechanisms.base import Mechanism
from fedsplit.privacy.secret import OwnerSecret
from fedsplit.seeding import numpy_generator

FITTED = (500, 1024)
"""Played tokens and alternatives that the channel's four coefficients are fitted to at most."""
_CHUNK = 256


@dataclass(frozen=True)
class Channel:
    """A fitted channel from true to sent tokens.

    Attributes:
        true: (V, d), what the noise is put on for each true token.
        sent: (V, d), what the nearest token is found among.
        weights: of the four features.
        log_total: (V,), log Z of each true token.
    """

    true: Tensor
    sent: Tensor
    weights: Tensor
    log_total: Tensor

    def log_likelihood(self, received: Tensor) -> Tensor:
        """Return log P(r | v) of received ids (n,) for every true token, ``(n, V)``."""
        utility = _utility(self.true, self.sent, received, self.weights).T
        utility[torch.arange(len(received)), received] += self.weights[3]
        return utility - self.log_total


@dataclass(frozen=True)
class ReplacedTokens(TokenAttack):
    """The attack: the sent text's most probable true text.

    Args:
        played: public tokens that the attacker sends through the mechanism itself.
        alternatives: sent tokens that the channel is fitted and normalised over.
        shortlist: candidates kept per token; the cost is its square.
        seed: of what is played and of the alternatives.
        top_k: guesses ranked per token.
    """

    name: ClassVar[str] = "replaced_tokens"
    knows: ClassVar[str] = (
        "white box: the initial bottom (k = 0), the mechanism that replaces tokens, bigrams of "
        "public text"
    )
    budget: ClassVar[tuple[str, ...]] = ("played", "alternatives", "shortlist")
    keys: ClassVar[Mapping[str, tuple[str, int]]] = {"played-tokens": ("played", 1)}
    words: ClassVar[str] = "the text that most probably was replaced by what left"
    played: int = 3000
    alternatives: int = 4096
    shortlist: int = 64
    seed: int = 0
    top_k: int = 10

    def __post_init__(self) -> None:
        for name in ("played", "alternatives"):
            check(getattr(self, name) >= 2, name, getattr(self, name), ">= 2 (tokens)")
        check(1 <= self.top_k <= self.shortlist, "top_k", self.top_k, "in 1..shortlist (guesses)")

    def applies(self, view: View) -> bool:
        """Return whether clean vectors of other tokens were received, before any block."""
        mechanism = view.public.mechanism
        replaces = mechanism is not None and mechanism.replaces_tokens
        known = replaces and any(len(x) > 1 for x in view.public.public_ids)
        return super().applies(view) and known and has_candidates(view)

    def read(self, view: View) -> Inversion:
        """Return the guesses.

        Raises:
            AttackError: there is no public text to play.
        """
        start = time.perf_counter()
        of = view.public
        channel = self.fit(of.known_mechanism, of.public_ids)
        found, _ = search(view.rows, of.candidates(view.rows), 1)
        top = self.invert([x[:, 0] for x in found], channel, of.language)
        return Inversion(top, time.perf_counter() - start)

    @torch.no_grad()
    def invert(
        self, received: Sequence[Tensor], channel: Channel, language: NgramModel
    ) -> list[Tensor]:
        """Return each token's best guesses ``(T_i, top_k)``.

        Args:
            received: per sample, the sent tokens ``(T_i,)``.
            channel: fitted.
            language: of public text.
        """
        prior = torch.from_numpy(language.unigram(np.arange(len(channel.true)))).float()
        kinds, which = torch.unique(torch.cat(list(received)), return_inverse=True)
        n = min(self.shortlist, len(prior))
        best = torch.empty(len(kinds), n, dtype=torch.int64)
        emission = torch.empty(len(kinds), n, dtype=torch.float64)
        for at in range(0, len(kinds), _CHUNK):
            log = channel.log_likelihood(kinds[at : at + _CHUNK])
            best[at : at + _CHUNK] = (log + prior).topk(n, dim=1).indices
            emission[at : at + _CHUNK] = log.gather(1, best[at : at + _CHUNK]).double()
        top = []
        for rows in torch.split(which, [len(x) for x in received]):
            if not len(rows):
                top.append(torch.zeros(0, self.top_k, dtype=torch.int64))
                continue
            tokens = best[rows].numpy()  # (T, n)
            posterior = marginals(tokens, emission[rows].numpy(), language)
            order = np.argsort(-posterior, axis=1, kind="stable")[:, : self.top_k]
            top.append(torch.from_numpy(np.take_along_axis(tokens, order, axis=1)))
        return top

    def fit(self, mechanism: Mechanism, public_ids: Sequence[Sequence[int]]) -> Channel:
        """Play public text through the mechanism, and fit the channel to what it sends.

        Raises:
            AttackError: there is no public text.
            PrivacyError: the mechanism replaces no tokens.
        """
        true, sent = mechanism.replacing_vectors()
        generator = numpy_generator(self.seed, "attacks", "replaced tokens")
        secret = OwnerSecret.for_simulation(self.seed, "attacker")
        pairs: list[Tensor] = []
        many = 0
        for at in generator.permutation(len(public_ids)).tolist():
            ids = torch.as_tensor(public_ids[at])[1:-1]  # what stands at the ends stays there
            if len(ids):
                pairs.append(torch.stack([ids, mechanism.replaced(ids, secret.stream("play", at))]))
                many += len(ids)
            if many >= self.played:
                break
        if not pairs:
            raise AttackError("public text: 0 tokens: must be >= 1 to play the mechanism")
        v, r = torch.cat(pairs, dim=1)  # (n,) both
        size = min(self.alternatives, len(sent))
        drawn = torch.from_numpy(generator.choice(len(sent), size, replace=False))
        weights = _fitted(true, sent, v[: FITTED[0]], r[: FITTED[0]], drawn[: FITTED[1]])
        with torch.no_grad():
            totals = [
                _utility(part, sent, drawn, weights).logsumexp(1)
                for part in torch.split(true, _CHUNK)
            ]
            spread = torch.cat(totals) + np.log(len(sent) / size)
            itself = _itself(true, sent, weights)
        return Channel(true, sent, weights, torch.logaddexp(spread, itself))


def _utility(true: Tensor, sent: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Return the utility of sending each of ``ids`` (m,) for true vectors (n, d), ``(n, m)``.

    Without what a token gains by being itself.
    """
    rows = sent[ids]
    distance = torch.cdist(true, rows)  # (n, m)
    out = (rows - sent.mean(0)).square().sum(1)  # (m,)
    return weights[0] * distance + weights[1] * distance.square() + weights[2] * out


def _itself(true: Tensor, sent: Tensor, weights: Tensor) -> Tensor:
    """Return the utility of staying for every true token, (V,)."""
    distance = (true - sent).norm(dim=1)
    out = (sent - sent.mean(0)).square().sum(1)
    utility: Tensor = weights[0] * distance + weights[1] * distance.square() + weights[2] * out
    return utility + weights[3]


def _fitted(true: Tensor, sent: Tensor, v: Tensor, r: Tensor, drawn: Tensor) -> Tensor:
    """Return the coefficients (4,) under which what was played is most probable.

    Args:
        true: (V, d).
        sent: (V, d).
        v: true tokens (n,).
        r: tokens sent for them (n,).
        drawn: alternatives (m,), beside the two.
    """
    rows, mean = true[v], sent.mean(0)
    distance = torch.cdist(rows, sent[drawn])  # (n, m)
    far = (sent[drawn] - mean).square().sum(1).expand(len(v), -1)
    own = (rows - sent[r]).norm(dim=1, keepdim=True)
    stay = (rows - sent[v]).norm(dim=1, keepdim=True)
    distance = torch.cat([distance, own, stay], dim=1)
    far = torch.cat([far, *((sent[x] - mean).square().sum(1, keepdim=True) for x in (r, v))], dim=1)
    same = torch.zeros_like(distance)
    same[:, -1] = 1.0
    same[:, -2] = (r == v).float()
    features = torch.stack([distance, distance.square(), far, same], dim=2)  # (n, m + 2, 4)
    scale = features.flatten(0, 1)[:, :3].std(0).clamp_min(1e-6)
    features[:, :, :3] /= scale
    # What is drawn stands for all others; what was sent and the token itself stand for themselves.
    offset = torch.zeros(distance.shape[1])
    offset[:-2] = np.log(len(sent) / len(drawn))
    twice = torch.zeros_like(distance)
    twice[:, -2][r == v] = -torch.inf  # it is the token itself, which stands in the last column
    found = torch.zeros(4, requires_grad=True)
    chosen = torch.where(r == v, distance.shape[1] - 1, distance.shape[1] - 2)
    optimizer = torch.optim.LBFGS([found], max_iter=30, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        utility = features @ found + offset + twice
        value = torch.nn.functional.cross_entropy(utility, chosen) + 1e-4 * found.square().sum()
        torch.autograd.backward(value)
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    weights: Tensor = found.detach().clone()
    weights[:3] /= scale
    return weights
