"""Everything that an attacker knows of one text, as log densities: rows, gradients, language.

The joint density of a text x and of what crossed for it is

    p(x) prod_t p(row_t | x_0 .. x_t) prod_t p(gradient_t | x_{t+1}, what was sent),

each factor exact for a causal model whose noise has a known law.  The prior of a token is the
mean of two predictions: the server's own, made from the rows as received, and the public model's,
given the text read so far; so no factor is more than ln 2 nats below the better of both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedsplit.attacks.base import View
from fedsplit.attacks.gradients.gradient_map import gradient_evidence
from fedsplit.attacks.gradients.next_tokens import logits_of, reads_logits
from fedsplit.attacks.inversion.row_evidence import RowEvidence, lawful

IMPOSSIBLE = 1e4  # nats


class TextEvidence:
    """What crossed of one text, ready to be asked about candidate tokens.

    Args:
        view: the attacker's.
        sample: which text.

    Attributes:
        length: T.
        tokens: log p(gradients | token) + constant, ``(T, V)``; zero for the first token, and where
            no gradient came back.
        exact_rows: whether rows were received as they are: only the right token explains one.
        served: the server's own log prediction from what it received, ``(T, V)``; None: not known.
    """

    def __init__(self, view: View, sample: int) -> None:
        self._public = view.public
        self._first = view.public.log_prior()  # (V,)
        self._received = view.rows[sample].float() if view.rows else None
        self._row: RowEvidence | None = None
        if self._received is not None and view.public.bottom is not None and lawful(view.public):
            self._row = RowEvidence(view.public, self._received)
        self.exact_rows = self._row is not None and self._row.exact
        self.length = len(view.rows[sample]) if view.rows else len(view.steps[sample][0].gradient)
        vocab = len(self._first)
        self.tokens = torch.zeros(self.length, vocab)
        self.served: Tensor | None = None
        steps = view.steps[sample] if view.steps else []
        if not steps or not (reads_logits(view) or view.public.head is not None):
            return
        self.served = torch.zeros(self.length, vocab)
        self.served[0] = self._first
        self.served[1:] = logits_of(view, steps[-1]).log_softmax(1)
        found = gradient_evidence(view, sample)
        # Without noise a candidate is right or wrong; rounding decides nothing beyond that.
        self.tokens[1:] = (found - found.amax(dim=1, keepdim=True)).clamp(min=-IMPOSSIBLE)

    @property
    def has_rows(self) -> bool:
        """Whether rows of a known law were received."""
        return self._row is not None

    def row(self, position: int) -> Tensor:
        """Return a row as it was received, ``(d,)``."""
        assert self._received is not None, "asked where there are rows"
        return self._received[position]

    def of_rows(self, states: Tensor, first: int = 0) -> Tensor:
        """Return log p(rows from ``first`` on | clean states (n, t, d)), ``(n, t)``."""
        assert self._row is not None, "asked where there are rows"
        return self._row(states, first)

    def prior(self, predicted: Tensor, position: Tensor | slice | int) -> Tensor:
        """Return the log prior where the public model predicts ``predicted`` (log, ``(.., V)``)."""
        if self.served is None:
            return predicted
        return torch.logaddexp(self.served[position].expand_as(predicted), predicted) - math.log(2)

    @property
    def first_prior(self) -> Tensor:
        """Log prior of the first token, ``(V,)``."""
        return self._first

    @torch.no_grad()
    def total(self, texts: Tensor) -> Tensor:
        """Return the joint log density of whole texts and what crossed, ``(n, T) -> (n,)``."""
        prior = self.prior(self.predictions(texts), slice(1, None))  # (n, T - 1, V)
        chosen = texts.unsqueeze(2)
        found = prior.gather(2, chosen[:, 1:]).sum((1, 2)) + self._first[texts[:, 0]]
        found += self.tokens.expand(len(texts), -1, -1).gather(2, chosen).sum((1, 2))
        if self.has_rows:
            found += self.of_rows(self.states(texts)).sum(1)
        return found

    def states(self, texts: Tensor) -> Tensor:
        """Return the public bottom's clean states of texts, ``(n, T, d)``."""
        states: Tensor = self._public.bottom(texts, torch.ones_like(texts))
        return states.float()

    def predictions(self, texts: Tensor) -> Tensor:
        """Return the public model's log prediction of tokens 1 .. T - 1, ``(n, T - 1, V)``."""
        logits: Tensor = self._public.model(input_ids=texts).logits[:, :-1]
        return logits.float().log_softmax(2)


class CachedReader:
    """The public model behind several texts of equal length, a token further at a time."""

    def __init__(self, model: Any) -> None:
        self._model, self._cache = model, None

    @torch.no_grad()
    def advance(self, parents: Tensor, tokens: Tensor) -> Tensor:
        """Return log predictions behind each text ``parents[i]`` + ``tokens[i]``, ``(n, V)``."""
        if self._cache is not None:
            self._cache.reorder_cache(parents)
        out = self._model(
            input_ids=tokens.unsqueeze(1), past_key_values=self._cache, use_cache=True
        )
        self._cache = out.past_key_values
        predicted: Tensor = out.logits[:, -1].float().log_softmax(1)
        return predicted


def union(parts: Sequence[Tensor]) -> Tensor:
    """Return the ids that occur in any of ``parts``, each once."""
    return torch.unique(torch.cat([p.flatten() for p in parts]))  # type: ignore[no-any-return]
