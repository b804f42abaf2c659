"""k-ary randomised response on private labels (Warner 1965; Ghazi et al., arXiv 2102.06062)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedsplit.config import LabelsConfig
from fedsplit.errors import PrivacyError, check
from fedsplit.privacy.labels.base import LabelProtection
from fedsplit.privacy.levels import Level, PolicyBound
from fedsplit.privacy.secret import SecretStream


@dataclass(frozen=True)
class RandomisedResponse(LabelProtection):
    """Protection that keeps a label with probability e^eps / (e^eps + C - 1), else draws another.

    Guarantee:
        epsilon-label-DP per row of the owner's training split: for any two labels of one row and
        any output, the probabilities differ by a factor of at most exp(epsilon); everything later
        (gradients, weights, metrics of training) is post-processing of the drawn label.  The text
        of the row is not covered.  Who always guesses the drawn label is right with
        probability e^eps / (e^eps + C - 1); a text that tells its label tells it still.

    What breaks it:
        A second draw for the same row adds its epsilon.  The owner therefore draws from a stream
        that belongs to (text, occurrence among equal texts, label, C, epsilon) and to nothing
        else: epochs, restarts and other runs see the same drawn label; another epsilon draws
        independently and adds up.  Two rows of one person add up as well.  Metrics of evaluation
        are about true labels of the held-out split, which is not covered.

    Args:
        epsilon: nats.
    """

    name: ClassVar[str] = "randomised-response"
    level: ClassVar[Level | None] = Level(
        "epsilon",
        "nats per row",
        total="epsilon",
        bound=PolicyBound(
            rule="labels.max_epsilon",
            says="Randomised response has epsilon <= {bound:g} nats.",
            absent="Randomised response may be as weak as the server asks.",
        ),
    )
    epsilon: float

    def __post_init__(self) -> None:
        good = self.epsilon > 0 and math.isfinite(self.epsilon)
        check(good, "epsilon", self.epsilon, "> 0 and finite (nats)")

    @classmethod
    def from_settings(cls, config: LabelsConfig) -> RandomisedResponse:
        return cls(config.epsilon)

    def keep(self, classes: int) -> float:
        """Return the probability with which a label is kept."""
        return 1.0 / (1.0 + (classes - 1) * math.exp(-self.epsilon))

    def guarantee(self) -> str:
        return f"{self.epsilon:g}-label-DP per training row, drawn once; texts are not covered"

    def relabel(self, label: int, classes: int, stream: SecretStream) -> int:
        """Return the drawn label.

        Raises:
            PrivacyError: if ``label`` is not in [0, classes) or there are fewer than two classes.
        """
        if classes < 2 or not 0 <= label < classes:
            raise PrivacyError(f"label={label}: must be in [0, {classes}), with >= 2 classes")
        first, second = stream.uniform(2)
        if first < self.keep(classes):
            return label
        other = min(int(second * (classes - 1)), classes - 2)
        return other + (other >= label)

    def transition(self, classes: int) -> Tensor:
        keep = self.keep(classes)
        matrix = torch.full((classes, classes), (1 - keep) / (classes - 1), dtype=torch.float64)
        return matrix.fill_diagonal_(keep)
