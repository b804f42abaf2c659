"""Attacks that read each next token off the gradient of its own loss, row by row.

What the row at position t tells is the token at t + 1, so a text's first token is not theirs: they
are scored on the others (:mod:`fedsplit.attacks.gradients.joint_decoding` reads that one as well).
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fedsplit.attacks.base import Step, TokenAttack, View
from fedsplit.attacks.gradients.known_head import LinearHead
from fedsplit.attacks.scoring import Inversion
from fedsplit.errors import AttackError

RANKED = 10


class NextTokenAttack(TokenAttack):
    """Base of the attacks: scores over the vocabulary for every row that has a target."""

    needs: ClassVar[tuple[str, ...]] = ("steps",)

    def applies(self, view: View) -> bool:
        """Return whether gradients of a language model's next tokens came back."""
        return super().applies(view) and of_language(view)

    @abstractmethod
    def scores(self, view: View, sample: int) -> Tensor:
        """Return one sample's scores, the best token's highest: rows 0 .. T - 2, ``(T - 1, V)``."""

    def read(self, view: View) -> Inversion:
        """Return the guesses; see :meth:`TokenAttack.read`."""
        start = time.perf_counter()
        top, covers = [], []
        ranked = min(RANKED, vocab_of(view))
        for sample, steps in enumerate(view.steps):
            rows = len(steps[0].gradient)
            found = torch.zeros(rows, ranked, dtype=torch.int64)
            if rows > 1:
                found[1:] = self.scores(view, sample).topk(ranked, dim=1).indices.cpu()
            top.append(found)
            covers.append(torch.arange(rows) > 0)
        return Inversion(top, time.perf_counter() - start, covers)

    def unaided_guess(self, view: View) -> Sequence[Tensor]:
        """Return the model's own top-1 for what the server received; no gradient is read."""
        return unaided_guesses(view)


def of_language(view: View) -> bool:
    """Return whether rows of gradients are about next tokens (not tags), as far as is known."""
    bottom = view.public.bottom
    return getattr(bottom, "task", None) in (None, "causal-lm")


def unaided_guesses(view: View) -> list[Tensor]:
    """Return the server's own top-1 of each text's tokens; 0 stands for the first, ``(T_i,)``."""
    first = torch.zeros(1, dtype=torch.int64)
    return [torch.cat([first, logits_of(view, s[-1]).argmax(1)]) for s in view.steps]


def vocab_of(view: View) -> int:
    """Return the number of token ids, known without a bottom where logits crossed."""
    wide = int(view.steps[0][0].output.shape[1])
    return wide if view.public.head is None else view.public.head.vocab


def reads_logits(view: View) -> bool:
    """Return whether logits, and not hidden states, were sent down."""
    return bool(view.steps) and view.steps[0][0].output.shape[1] == vocab_of(view)


def logits_of(view: View, step: Step) -> Tensor:
    """Return the server's prediction of one text's targets, ``(T - 1, V)``.

    Raises:
        AttackError: hidden states were sent and the head is not known.
    """
    sent = step.output[:-1].float()
    return sent if reads_logits(view) else head_of(view).logits(sent)


def head_of(view: View) -> LinearHead:
    """Return the head as the server knows it.

    Raises:
        AttackError: it is not known.
    """
    if view.public.head is None:
        raise AttackError("head: must be given where hidden states were sent")
    return view.public.head
