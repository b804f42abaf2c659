"""Inversion behind blocks by the state that every token has: a linear discriminant, any k.

The bottom is public, so each token of the vocabulary is sent through it behind a few tokens of
public text.  The state that a token has elsewhere is close to a linear function of the one that it
has there, because the residual stream carries tokens through the blocks.  What is left is measured
on public text: its covariance, plus that of the announced noise, is what rows are whitened by.
Then a row is read as its nearest token (linear discriminant analysis, Fisher 1936, with one class
for each token; :class:`fedsplit.attacks.inversion.nearest.NearestNeighbour` is the case k = 0).

Unlike a trained inverter (:mod:`fedsplit.attacks.inversion.learned`) it knows every token of the
vocabulary, also those that public text lacks, and noise is never learned from.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedsplit.attacks.base import Public, TokenAttack, View
from fedsplit.attacks.inversion.carried_states import Carried, Whitened, noise_covariance
from fedsplit.attacks.inversion.learned import DrawnNoise, taught_on
from fedsplit.attacks.inversion.nearest import has_candidates
from fedsplit.attacks.inversion.row_evidence import lawful
from fedsplit.attacks.inversion.token_search import PrefixRunner, reads_left_to_right
from fedsplit.attacks.scoring import Inversion
from fedsplit.errors import AttackError, check
from fedsplit.models.modes import frozen
from fedsplit.privacy.mechanisms.base import clip_rows

AT_ONCE = 1024  # tokens sent through the bottom, or compared with rows, together
HELD = 2**29  # bytes of one copy of the states at most; the rarest tokens have none beyond
DRAWN = 500  # public texts that the size of the noise is taken from
ALIKE = 20  # texts that all start with one token: a start that says nothing


@dataclass(frozen=True)
class TokenStates(TokenAttack):
    """The attack: rows are read as the token whose state, carried to them, is nearest.

    Cost: each token of the vocabulary once through the bottom for each context, and a product of
    (T, d) by (d, V) a text.

    Args:
        contexts: public texts whose first tokens the vocabulary is sent behind; their states are
            averaged.
        context_tokens: how many tokens of them.
        public_samples: public texts that the residual is measured on at most.
        seconds: of sending the vocabulary at most, most frequent tokens first; those that were not
            reached are never guessed.  0 = no bound.
        seed: of the choice of texts and of simulated noise.
        top_k: guesses ranked per token.
    """

    name: ClassVar[str] = "token_states"
    knows: ClassVar[str] = "white box: the initial bottom (any k), the mechanism's law, public text"
    budget: ClassVar[tuple[str, ...]] = ("contexts", "context_tokens", "public_samples", "seconds")
    words: ClassVar[str] = "read as the token whose state is nearest, by what public text leaves"
    contexts: int = 2
    context_tokens: int = 3
    public_samples: int = 3000
    seconds: float = 0.0
    seed: int = 0
    top_k: int = 10

    def __post_init__(self) -> None:
        for name in ("contexts", "context_tokens", "public_samples", "top_k"):
            check(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        check(self.seconds >= 0, "seconds", self.seconds, ">= 0")

    def applies(self, view: View) -> bool:
        """Return whether rows of a known law were received, behind blocks, with public text."""
        of = view.public
        fits = super().applies(view) and not has_candidates(view) and lawful(of)
        return fits and teaches(of)

    def read(self, view: View) -> Inversion:
        """Return the guesses; see :meth:`TokenAttack.read`."""
        start = time.perf_counter()
        top = self.taught(view.public).rank(view.rows, self.top_k)
        return Inversion(top, time.perf_counter() - start)

    def taught(self, of: Public) -> StateReader:
        """Return the reader of a bottom and a law; searches find it in ``of``.

        Raises:
            AttackError: no public text of two tokens, or states and noise of different widths.
        """
        if of.token_reader is not None and of.token_reader.made_by == self._maker:
            found: StateReader = of.token_reader
            return found
        states, every = taught_on(of, self.public_samples, self.seed)
        clip = 0.0 if of.mechanism is None else of.mechanism.sent_norm
        pairs = zip(states, every, strict=True)
        texts = [(clip_rows(x.cpu().float(), clip), y) for x, y in pairs if len(y) >= 2]
        if not texts or not teaches(of):
            raise AttackError("public text: 0 texts of two tokens, one a word: must be >= 1")
        causal = reads_left_to_right(of.bottom)
        with frozen(of.bottom):
            tokens, behind, first = self._vocabulary(of, [y for _, y in texts], causal, clip)
        noise = DrawnNoise(of.mechanism, self.seed)
        drawn = noise_covariance([x for x, _ in texts[:DRAWN]], noise)
        fitted = Carried.of(behind, tokens, texts, of, drawn, int(causal))
        starts = None
        if first is not None:
            floor = 1e-8 * float(first.var(0).mean())
            starts = Whitened.of(first, drawn, floor)
        reader = StateReader(fitted, starts, tokens, of.log_prior()[tokens], self._maker)
        of.token_reader = reader
        return reader

    @property
    def _maker(self) -> TokenStates:
        """What a reader depends on."""
        return replace(self, top_k=1)

    @torch.no_grad()
    def _vocabulary(
        self, of: Public, texts: Sequence[Tensor], causal: bool, clip: float
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return ids (n,), their states in public contexts (n, d), and at a text's start or None.

        The latter where states depend on what stands before them and a text may start with a word.
        """
        room = HELD // (4 * int(of.bottom.hidden_size))
        order = of.log_prior().argsort(descending=True)[:room]
        long = [x for x in texts if len(x) > self.context_tokens] or list(texts)
        heads = [x[: self.context_tokens] for x in long[: self.contexts]]
        begun = {int(x[0]) for x in texts}
        starting = causal and (
            len(begun) > 1 or not (begun <= of.special_ids or len(texts) > ALIKE)
        )
        tail = None if causal else long[0][-1:]
        until = time.perf_counter() + (self.seconds or float("inf"))
        runner = PrefixRunner(of.bottom, of.embedding) if causal else None
        behind, first = [], []
        for part in torch.split(order, AT_ONCE):
            seen = torch.stack([_states(of, runner, h, part, tail) for h in heads]).mean(0)
            behind.append(clip_rows(seen, clip))
            if starting:
                first.append(clip_rows(_states(of, runner, heads[0][:0], part, tail), clip))
            if time.perf_counter() > until:
                break
        order = order[: sum(map(len, behind))]
        return order, torch.cat(behind), torch.cat(first) if starting else None


def teaches(of: Public) -> bool:
    """Return whether a public text has a word behind its first token."""
    return any(v not in of.special_ids for ids in of.public_ids for v in map(int, ids[1:]))


def _states(
    of: Public, runner: PrefixRunner | None, head: Tensor, ids: Tensor, tail: Tensor | None
) -> Tensor:
    """Return the state of each of ``ids`` between a head and a tail, ``(n, d)``, on the CPU."""
    if runner is not None:
        runner.advance(head.tolist())
        return runner.tokens(ids).cpu()
    assert tail is not None, "states that depend on what follows"
    parts = [head.expand(len(ids), -1), ids[:, None], tail.expand(len(ids), -1)]
    whole = torch.cat(parts, dim=1).to(next(of.bottom.parameters()).device)
    hidden: Tensor = of.bottom(whole, torch.ones_like(whole))
    return hidden[:, len(head)].float().cpu()


@dataclass(frozen=True)
class StateReader:
    """An attacker ready to read.

    Attributes:
        fit: of every position but a causal text's first.
        starts: of that one; None: it is read as the others.
        tokens: that can be guessed, ``(n,)``.
        prior: their log frequency in public text, ``(n,)``.
        made_by: the attack that made it.
    """

    fit: Carried
    starts: Whitened | None
    tokens: Tensor
    prior: Tensor
    made_by: TokenStates

    @torch.no_grad()
    def scores(self, rows: Tensor) -> Tensor:
        """Return each token's log posterior up to a constant, ``(T, d) -> (T, n)``.

        Raises:
            AttackError: rows of another width.
        """
        width = self.fit.offsets.shape[1]
        if rows.dim() != 2 or rows.shape[1] != width:
            raise AttackError(f"representations={tuple(rows.shape)}: must be (T, {width})")
        rows = rows.detach().cpu().float()
        found = self.fit.scores(rows, torch.arange(len(rows)))
        if self.starts is not None and len(rows):
            found[0] = self.starts.scores(rows[:1])[0]
        return found + self.prior

    def rank(self, representations: Sequence[Tensor], top_k: int) -> list[Tensor]:
        """Return each sample's guesses, best first, ``(T_i, top_k)``."""
        k = min(top_k, len(self.tokens))
        out = []
        for x in representations:
            best = [self.tokens[self.scores(x).topk(k, dim=1).indices]]
            out.append(torch.cat(best))
        return out
