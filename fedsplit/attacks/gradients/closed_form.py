"""The next token in closed form: W[y] = W^T p - dL/dh for a head z = W h that the server knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedsplit.attacks.base import View
from fedsplit.attacks.gradients.next_tokens import NextTokenAttack, head_of, logits_of, reads_logits
from fedsplit.attacks.gradients.token_recovery import GradientNoise, log_likelihood


@dataclass(frozen=True)
class ClosedForm(NextTokenAttack):
    """The attack on a head at the owner: the nearest row of W, distances summed over passes.

    It believes gradients to be as they were computed, and asks no prior.
    """

    name: ClassVar[str] = "closed_form"
    knows: ClassVar[str] = "the returned gradients, the hidden states sent for them, the head"
    words: ClassVar[str] = "closed form from hidden states' gradients"

    def applies(self, view: View) -> bool:
        """Return whether gradients of hidden states came back, and the head is known."""
        known = view.public.head is not None
        return super().applies(view) and known and not reads_logits(view)

    def scores(self, view: View, sample: int) -> Tensor:
        """See :meth:`NextTokenAttack.scores`."""
        head = head_of(view)
        total = torch.zeros(())
        for step in view.steps[sample]:
            rows, logits = step.gradient[:-1], logits_of(view, step)
            found = log_likelihood(rows, logits, GradientNoise(), head=head.weight, targets=1)
            total = total + torch.cat(list(found))
        return total
