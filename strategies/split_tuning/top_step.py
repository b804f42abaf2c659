"""One forward and backward of the top for a cohort step, whoever computes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fedsplit.models.splitting.halves import Top
from fedsplit.models.splitting.heads import select_positions

from ..sessions.length_buckets import LengthBuckets


class TopRows:
    """What goes down to owners for a step: rows of the top's output.

    Args:
        top: of the cut model.
        positions: which final hidden states the owners' head reads; empty: the head is the top's.
        tail: how many last blocks the owners hold.
        per_token: whether there is a row for every token, not for every text.
    """

    def __init__(self, top: Top, positions: str, tail: int, per_token: bool) -> None:
        self.top = top
        self._buckets = LengthBuckets(top)
        self._positions, self._tail = positions, tail
        self.per_token = per_token

    def __call__(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return rows: logits (B, C) or (tokens, V), or final hidden states.

        Args:
            hidden: (B, T, d), right-padded.
            mask: (B, T).
        """
        if self._positions:
            states = self.top.hidden_states(hidden, mask, tail=self._tail)
            return select_positions(states, mask, self._positions).float()
        if self.per_token:
            return self._buckets.tokens(hidden, mask)
        answers: Tensor = self._buckets(hidden, mask)
        return answers


class Step(Protocol):
    """A forward whose backward is still to come.

    Attributes:
        rows: what the top answered, without graph.
    """

    rows: Tensor

    def backward(self, upward: Tensor) -> Tensor | None:
        """Add the gradients of the trained parameters; return that of ``hidden``, if asked for."""


class Forward(Protocol):
    """Computes steps of a top.

    Attributes:
        per_token: whether there is a row for every token, not for every text.
    """

    per_token: bool

    def __call__(
        self, hidden: Tensor, mask: Tensor, texts: Sequence[int], *, learn: bool, joint: bool
    ) -> Step:
        """Return the forward of one step.

        Args:
            hidden: (B, T, d), right-padded, the owners' texts in the order of the cohort.
            mask: (B, T).
            texts: of each owner, which add up to B.
            learn: whether a backward follows.
            joint: whether it returns the gradient of ``hidden``.
        """

    def train(self, mode: bool) -> None:
        """Set training or evaluation mode."""

    def close(self) -> None:
        """Let go of whatever computes."""


class StepHere:
    """A step of this process."""

    def __init__(self, hidden: Tensor, rows: Tensor) -> None:
        self._hidden, self._graph = hidden, rows
        self.rows = rows.detach()

    def backward(self, upward: Tensor) -> Tensor | None:
        """See :class:`Step`."""
        torch.autograd.backward([self._graph], [upward.to(self._graph)])
        return self._hidden.grad


class ForwardHere:
    """Computes in this process.

    Args:
        rows: of the top.
    """

    def __init__(self, rows: TopRows) -> None:
        self._rows = rows
        self.per_token = rows.per_token

    def __call__(
        self, hidden: Tensor, mask: Tensor, texts: Sequence[int], *, learn: bool, joint: bool
    ) -> StepHere:
        """See :class:`Forward`."""
        if joint:
            hidden.requires_grad_()
        with torch.set_grad_enabled(learn):
            return StepHere(hidden, self._rows(hidden, mask))

    def train(self, mode: bool) -> None:
        """See :class:`Forward`."""
        self._rows.top.train(mode)

    def close(self) -> None:
        """Nothing to let go of."""
