"""Next tokens from gradients of a head that was trained away from what the server knows.

The closed form needs W.  Where the owners' head has moved, its rows can be estimated from the very
gradients: whichever token y a position has, W[y] = W^T p - dL/dh.  Expectation maximisation reads
tokens with the head as it is believed to be, averages those estimates over each token's
occurrences, and reads again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedsplit.attacks.base import View
from fedsplit.attacks.gradients.closed_form import ClosedForm
from fedsplit.attacks.gradients.known_head import LinearHead
from fedsplit.attacks.gradients.next_tokens import head_of
from fedsplit.attacks.scoring import Inversion
from fedsplit.errors import check

ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class HeadRefit(ClosedForm):
    """The attack: the closed form with a head that is estimated from what came back.

    Args:
        rounds: of expectation maximisation.
        anchor: weight of a row as the server knows it, in occurrences of its token.
    """

    name: ClassVar[str] = "head_refit"
    knows: ClassVar[str] = (
        "the returned gradients, the hidden states sent for them, the head as it was"
    )
    words: ClassVar[str] = "closed form with a head estimated from the gradients"
    budget: ClassVar[tuple[str, ...]] = ("rounds", "anchor")
    rounds: int = 8
    anchor: float = 0.5

    def __post_init__(self) -> None:
        check(self.rounds >= 1, "rounds", self.rounds, ">= 1")
        check(self.anchor > 0, "anchor", self.anchor, "> 0 (occurrences)")

    def read(self, view: View) -> Inversion:
        """Return the guesses; see :meth:`TokenAttack.read`."""
        fitted = replace(view, public=replace(view.public, head=self.fit(view)))
        return super().read(fitted)

    @torch.no_grad()
    def fit(self, view: View) -> LinearHead:
        """Return the head that explains best what came back."""
        known = head_of(view)
        steps = [step for mine in view.steps for step in mine]
        hidden = torch.cat([step.output[:-1] for step in steps]).float()  # (N, d)
        rows = torch.cat([step.gradient[:-1] for step in steps]).float()
        seen = rows.abs().sum(1) > 0
        hidden, rows = hidden[seen], rows[seen]
        head = known
        for _ in range(self.rounds):
            total, counts = self._occurrences(head, hidden, rows)
            moved = (self.anchor * known.weight + total) / (self.anchor + counts)[:, None]
            head = LinearHead(moved, known.bias)
        return head

    def _occurrences(self, head: LinearHead, hidden: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum of each token's row estimates, ``(V, d)``, and its expected count."""
        total, counts = torch.zeros_like(head.weight), torch.zeros(head.vocab)
        norms = head.weight.square().sum(1)  # (V,)
        blocks = (torch.split(x, ROWS_AT_ONCE) for x in (hidden, rows))
        for h, g in zip(*blocks, strict=True):
            prior = head.logits(h).log_softmax(1)  # (n, V)
            estimates = prior.exp() @ head.weight - g  # (n, d)
            squared = (
                estimates.square().sum(1, keepdim=True) - 2 * estimates @ head.weight.T + norms
            ).clamp(min=0)
            spread = (2 * squared.amin(1).mean() / h.shape[1]).clamp(min=1e-12)
            share = (prior - squared / spread).softmax(1)
            total += share.T @ estimates
            counts += share.sum(0)
        return total, counts
