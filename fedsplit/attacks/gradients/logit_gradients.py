"""The next token is the one negative entry of its logits' gradient (arXiv 2102.08504)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedsplit.attacks.base import View
from fedsplit.attacks.gradients.next_tokens import NextTokenAttack, reads_logits


@dataclass(frozen=True)
class LogitGradients(NextTokenAttack):
    """The attack on a head at the server: argmin of dL/dz = p - onehot(y), summed over passes."""

    name: ClassVar[str] = "logit_gradients"
    knows: ClassVar[str] = "the returned gradients of the logits"
    words: ClassVar[str] = "smallest entry of each logits' gradient"

    def applies(self, view: View) -> bool:
        """Return whether logits' gradients came back."""
        return super().applies(view) and reads_logits(view)

    def scores(self, view: View, sample: int) -> Tensor:
        """See :meth:`NextTokenAttack.scores`."""
        rows = [step.gradient[:-1].float() for step in view.steps[sample]]
        return -sum(rows[1:], rows[0])
