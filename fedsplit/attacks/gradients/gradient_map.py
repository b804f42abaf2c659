"""The most probable next token given noisy gradients of a known law and the model's prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedsplit.attacks.base import View
from fedsplit.attacks.gradients.next_tokens import NextTokenAttack, head_of, logits_of, reads_logits
from fedsplit.attacks.gradients.token_recovery import log_likelihood


@dataclass(frozen=True)
class GradientMap(NextTokenAttack):
    """The attack: log-likelihoods of all passes add up, and the last prediction is the prior.

    Args:
        prior: whether the model's own prediction counts; without it, maximum likelihood.
    """

    name: ClassVar[str] = "gradient_map"
    knows: ClassVar[str] = (
        "the returned gradients, what was sent for them, the head, the noise's law, the model's "
        "own prediction"
    )
    words: ClassVar[str] = "maximum a posteriori from gradients of a known law"
    budget: ClassVar[tuple[str, ...]] = ("prior",)
    prior: bool = True

    def applies(self, view: View) -> bool:
        """Return whether the law of what came back is known."""
        if not super().applies(view) or view.public.gradient_noise.law == "none":
            return False
        return reads_logits(view) or view.public.head is not None

    def scores(self, view: View, sample: int) -> Tensor:
        """See :meth:`NextTokenAttack.scores`."""
        return gradient_evidence(view, sample) + (prior_of(view, sample) if self.prior else 0.0)


def gradient_evidence(view: View, sample: int) -> Tensor:
    """Return log p(all passes' rows | token) + a constant per row, ``(T - 1, V)``."""
    weight = None if reads_logits(view) else head_of(view).weight
    total = torch.zeros(())
    for step in view.steps[sample]:
        rows, logits = step.gradient[:-1], logits_of(view, step)
        noise = view.public.gradient_noise
        found = log_likelihood(rows, logits, noise, head=weight, targets=1)
        seen = rows.abs().sum(1, keepdim=True) > 0  # else the position is no target
        total = total + torch.where(seen, torch.cat(list(found)), 0.0)
    return total


def prior_of(view: View, sample: int) -> Tensor:
    """Return the model's own log prediction, by its last pass, ``(T - 1, V)``."""
    return logits_of(view, view.steps[sample][-1]).log_softmax(1)
