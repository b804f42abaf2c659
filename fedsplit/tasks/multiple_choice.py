"""Multiple choice by likelihood: a language model is tuned to continue questions rightly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsplit.sums import Family
from fedsplit.tasks.base import ChoiceGroups
from fedsplit.tasks.causal_lm import CausalLM

CHOICES = Family("choices", (3,))
"""Questions that the sum of log-likelihoods answers rightly, its mean over characters, and all."""


class MultipleChoice(CausalLM):
    """The right choice as the completion of its question; accuracy by likelihood of the choices.

    In training a text is the question with its right choice, of which the choice's tokens are
    predicted; so what tells a target tells the text, as in language modelling.  In an evaluation
    every choice is a text of its own, which crosses and counts as one, and the choice with the
    highest log-likelihood answers: summed over tokens, or divided by the choice's characters (the
    harness' ``acc`` and ``acc_norm``).  A tie is no right answer.

    What leaves in an evaluation, where the owner's policy lets it: three counts.
    """

    name: ClassVar[str] = "multiple-choice"
    words: ClassVar[str] = "choices"
    form: ClassVar[str] = "choices"
    metric: ClassVar[str] = "choice-accuracy"

    def families(self) -> tuple[Family, ...]:
        """Return the counts of questions."""
        return (CHOICES,)

    def count(
        self,
        scores: Tensor,
        targets: Tensor,
        parts: Sequence[int],
        about: object = None,
    ) -> dict[str, float]:
        """Return how many questions are answered rightly, by both readings, and how many there are.

        The first choice of each question is the right one.
        """
        if not isinstance(about, ChoiceGroups):
            return {}
        nats = torch.stack(
            [
                -part.double().sum()
                for part in torch.split(self.losses(scores, targets), list(parts))
            ]
        )
        found = {"choices-0": 0.0, "choices-1": 0.0, "choices-2": float(len(about.sizes))}
        for key, value in (("choices-0", nats), ("choices-1", nats / about.characters.double())):
            for own in torch.split(value, list(about.sizes)):
                found[key] += float(own[0] > own[1:].max())
        return found

    def averaged(self, about: object) -> list[bool] | None:
        """Return that a question's right choice alone is averaged, as in training."""
        if not isinstance(about, ChoiceGroups):
            return None
        return [place == 0 for size in about.sizes for place in range(size)]

    def scores(self, sums: Mapping[str, float]) -> dict[str, Any]:
        """Return accuracy by the sum of log-likelihoods, and by its mean over characters."""
        questions = sums.get("choices-2", 0.0)
        if not questions:
            return {}
        return {
            "choice-accuracy": sums.get("choices-0", 0.0) / questions,
            "choice-accuracy-norm": sums.get("choices-1", 0.0) / questions,
            "questions": questions,
        }
