"""Language modelling: a text's own tokens are its targets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from fedsplit.tasks.base import CrossEntropy


class CausalLM(CrossEntropy):
    """The next token, for every token of a text (or of its completions); cross-entropy.

    There are no labels beside the text: what tells a target tells the text.
    """

    name: ClassVar[str] = "causal-lm"
    words: ClassVar[str] = "text"
    head: ClassVar[str] = "causal-lm"
    labelled: ClassVar[bool] = False
    per_token: ClassVar[bool] = True
    metric: ClassVar[str] = "perplexity"
    lower_is_better: ClassVar[bool] = True

    def __init__(self, outputs: int | None = None) -> None:
        super().__init__(None)

    def headline(self, metrics: Mapping[str, Any]) -> float | None:
        """Return the perplexity of the mean loss."""
        loss = metrics.get("loss")
        return None if loss is None else math.exp(min(loss, 50.0))

    @classmethod
    def outputs_of(cls, labels: int) -> None:
        """Return None: as many as the vocabulary has."""
