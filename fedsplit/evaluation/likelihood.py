"""Log-likelihoods of continuations: batched, sorted by length, common prefixes run once.

All choices of one question share its text.  Questions of the same number of tokens run together, so
that no row of a cached prefix is padded, and their keys and values serve every choice.  Families
whose cache cannot be used that way (an emulator with harmonizers, a short sliding window) are found
out by comparing the first and longest batch with plain forward passes, and run without.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from fedsplit.errors import DataError, check
from fedsplit.evaluation.perplexity import LOGITS, Model, forward, vocabulary
from fedsplit.models.modes import evaluating
from fedsplit.models.positions import longest

log = logging.getLogger(__name__)

Ids = tuple[int, ...]
Progress = Callable[[int, int], None]
# How far a cached log-likelihood may be from a plain one, relative to 1 + its size.
TOLERANCE = 1e-3
WASTE = 32  # padding tokens that cost about as much as one more forward pass


class Score(NamedTuple):
    """A continuation's summed log-likelihood (nats), and whether greedy decoding would say it."""

    nats: float
    greedy: bool


class _Group(NamedTuple):
    context: Ids
    tails: tuple[Ids, ...]


class Likelihood:
    """Scores continuations of contexts under one causal language model.

    Args:
        model: a causal language model.
        max_length: longest context plus continuation; 0: the model's positions.  Longer contexts
            lose their beginning.
        batch_tokens: tokens of one forward pass, about.
        cache: whether shared contexts may run once.

    Attributes:
        forwarded: tokens that have gone through the model (what the cache saves).
        cached: whether the cache is in use; False once it was found not to serve.
    """

    def __init__(
        self,
        model: Model,
        *,
        max_length: int = 0,
        batch_tokens: int = 4096,
        cache: bool = True,
    ) -> None:
        check(max_length >= 0, "max_length", max_length, ">= 0 (tokens; 0: the model's)")
        check(batch_tokens >= 1, "batch_tokens", batch_tokens, ">= 1")
        self.model = model
        self.max_length = min(max_length or longest(model), longest(model))
        check(self.max_length >= 2, "max_length", self.max_length, ">= 2 (tokens)")
        self.batch_tokens = min(batch_tokens, max(1, LOGITS // vocabulary(model)))
        self.cached = cache
        self.forwarded = 0
        self._checked = False
        self._last_only = "logits_to_keep" in inspect.signature(model.forward).parameters

    @torch.no_grad()
    def score(
        self,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        progress: Progress | None = None,
    ) -> list[Score]:
        """Return the score of each (context, continuation), in order; equal pairs run once.

        Raises:
            DataError: an empty context or continuation, a continuation longer than the model, or
                an id that the model has no embedding for.
        """
        keys = [self._cut(tuple(c), tuple(t)) for c, t in pairs]
        shared: dict[Ids, dict[Ids, None]] = {}
        for context, tail in keys:
            shared.setdefault(context, {})[tail] = None
        groups = [_Group(context, tuple(tails)) for context, tails in shared.items()]
        done: dict[tuple[Ids, Ids], Score] = {}
        total = sum(len(g.tails) for g in groups)
        with evaluating(self.model):
            several = [g for g in groups if len(g.tails) > 1 and len(g.context) > 1]
            if self.cached and not self._checked and several:
                self._try_cache(several)
            if not self.cached:
                several = []
            together = {g.context for g in several}
            single = _singles([g for g in groups if g.context not in together])
            behind = list(self._prefix_batches(several))
            # Long continuations of many lengths can pad more than the prefix saves.
            alone = list(self._single_batches(_singles(several)))
            if sum(map(_single_cost, alone)) < sum(map(_prefix_cost, behind)):
                single, behind = [*single, *_singles(several)], []
            work = [(batch, self._with_prefix) for batch in behind]
            work += [(batch, self._plain) for batch in self._single_batches(single)]
            for batch, run in work:
                for group, scores in zip(batch, run(batch), strict=True):
                    for tail, score in zip(group.tails, scores, strict=True):
                        done[group.context, tail] = score
                if progress is not None:
                    progress(len(done), total)
        return [done[key] for key in keys]

    def _cut(self, context: Ids, tail: Ids) -> tuple[Ids, Ids]:
        if not context or not tail:
            raise DataError(f"pair ({len(context)}, {len(tail)} tokens): must be >= 1 each")
        # The last token is predicted, never read: one more than the model's positions fits.
        room = self.max_length + 1 - len(tail)
        if room < 1:
            raise DataError(f"continuation: {len(tail)} tokens: must be <= {self.max_length}")
        rows = vocabulary(self.model)
        worst = max(max(context), max(tail))
        if worst >= rows or min(min(context), min(tail)) < 0:
            raise DataError(f"ids: up to {worst}: must be in 0..{rows - 1}")
        return context[-room:], tail

    def _single_batches(self, groups: list[_Group]) -> Iterator[list[_Group]]:
        """Yield groups of one continuation each, longest first, within the token bound."""
        groups.sort(key=lambda g: -len(g.context) - len(g.tails[0]))
        batch: list[_Group] = []
        for group in groups:
            width = len((batch or [group])[0].context) + len((batch or [group])[0].tails[0])
            if batch and (len(batch) + 1) * width > self.batch_tokens:
                yield batch
                batch = []
            batch.append(group)
        if batch:
            yield batch

    def _prefix_batches(self, groups: list[_Group]) -> Iterator[list[_Group]]:
        """Yield groups with contexts of one length, within the token bound."""
        groups.sort(key=lambda g: (-len(g.context), -max(map(len, g.tails))))
        batch: list[_Group] = []
        rows = real = 0
        for group in groups:
            long = max(map(len, (batch or [group])[0].tails))
            more, length = rows + len(group.tails), len(group.context)
            own = sum(map(len, group.tails))
            full = more * (length + long) > self.batch_tokens
            # Short continuations do not wait for long ones: padding runs too.
            wasted = more * long > 2 * (real + own) + WASTE
            if batch and (full or wasted or length != len(batch[0].context)):
                yield batch
                batch, more, real = [], len(group.tails), 0
            batch.append(group)
            rows, real = more, real + own
        if batch:
            yield batch

    def _try_cache(self, groups: list[_Group]) -> None:
        """Find out whether the model's cache serves, on some of the longest contexts."""
        self._checked = True
        length = max(len(g.context) for g in groups)
        some = [g for g in groups if len(g.context) == length][:4]
        plain = self._plain(some)
        try:
            found = self._with_prefix(some)
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            log.info("no prefix cache for this model: %s", error)
            self.cached = False
            return
        for a, b in zip(chain(*plain), chain(*found), strict=True):
            if not abs(a.nats - b.nats) <= TOLERANCE * (1 + abs(a.nats)):
                log.info("no prefix cache for this model: %.6g is %.6g with it", a.nats, b.nats)
                self.cached = False
                return

    def _plain(self, batch: list[_Group]) -> list[list[Score]]:
        """Run each context with each continuation, padded on the right (which is never seen)."""
        rows = [(g.context, tail) for g in batch for tail in g.tails]
        sequences = [(*context, *tail[:-1]) for context, tail in rows]
        logits = forward(self.model, self._padded(sequences)).logits  # (R, T, V)
        scores = iter(
            _score(logits[i, len(context) - 1 : len(context) - 1 + len(tail)], tail)
            for i, (context, tail) in enumerate(rows)
        )
        return [[next(scores) for _ in g.tails] for g in batch]

    def _with_prefix(self, batch: list[_Group]) -> list[list[Score]]:
        """Run each context once, then the continuations behind its keys and values."""
        contexts = self._padded([g.context for g in batch])  # (G, C), all of one length
        options = {"logits_to_keep": 1} if self._last_only else {}
        out = forward(self.model, contexts, use_cache=True, **options)
        first = out.logits[:, -1]  # (G, V): predicts each continuation's first token
        rows = [(g, tail) for g, group in enumerate(batch) for tail in group.tails]
        rest = [(tail[:-1], i) for i, (_, tail) in enumerate(rows) if len(tail) > 1]
        later: dict[int, Tensor] = {}
        if rest:
            cache = out.past_key_values
            which = torch.tensor([rows[i][0] for _, i in rest], device=contexts.device)
            cache.reorder_cache(which)  # repeats a context's row for each of its continuations
            tails = self._padded([tail for tail, _ in rest])  # (R, S)
            mask = tails.new_ones(len(rest), contexts.shape[1] + tails.shape[1])
            logits = forward(
                self.model, tails, use_cache=True, past_key_values=cache, attention_mask=mask
            ).logits
            later = {i: logits[row] for row, (_, i) in enumerate(rest)}
        scores = []
        for i, (g, tail) in enumerate(rows):
            own = first[g].unsqueeze(0)  # (1, V)
            if len(tail) > 1:
                own = torch.cat([own, later[i][: len(tail) - 1]])  # (S, V)
            scores.append(_score(own, tail))
        each = iter(scores)
        return [[next(each) for _ in g.tails] for g in batch]

    def _padded(self, sequences: Sequence[Ids]) -> Tensor:
        width = max(map(len, sequences))
        device = next(self.model.parameters()).device
        self.forwarded += sum(map(len, sequences))
        return torch.tensor([[*s, *([0] * (width - len(s)))] for s in sequences], device=device)


def _singles(groups: list[_Group]) -> list[_Group]:
    return [_Group(g.context, (tail,)) for g in groups for tail in g.tails]


def _single_cost(batch: list[_Group]) -> int:
    """Tokens run by a batch of single continuations, padding and the call itself counted."""
    return WASTE + len(batch) * max(len(g.context) + len(g.tails[0]) for g in batch)


def _prefix_cost(batch: list[_Group]) -> int:
    tails = [tail for g in batch for tail in g.tails]
    return 2 * WASTE + len(batch) * len(batch[0].context) + len(tails) * max(map(len, tails))


def _score(logits: Tensor, tail: Ids) -> Score:
    """Score one continuation (S ids) by the logits (S, V) that predict it."""
    true = torch.tensor(tail, device=logits.device)
    log_p = torch.log_softmax(logits.float(), dim=-1)
    nats = log_p.gather(1, true.unsqueeze(1)).double().sum()
    return Score(float(nats), bool((logits.argmax(-1) == true).all()))
