"""No noise at all: the baseline, and an explicit choice rather than a missing one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedsplit.privacy.mechanisms.base import Mechanism, check_distance, check_hidden, check_views
from fedsplit.privacy.mechanisms.calibration import CalibrationInputs
from fedsplit.privacy.secret import SecretStream


@dataclass(frozen=True)
class NoNoise(Mechanism):
    """Mechanism that sends representations as they are.

    Guarantee:
        None.  At k = 0 the text is read off exactly; causal blocks do not help (arXiv 2510.15511).
    """

    name: ClassVar[str] = "none"
    adds_noise: ClassVar[bool] = False

    @classmethod
    def from_settings(cls, inputs: CalibrationInputs) -> NoNoise:
        return cls()

    def privatise(
        self, hidden: Tensor, stream: SecretStream, scale: Tensor | None = None
    ) -> Tensor:
        """Return ``hidden`` itself, after the checks of :meth:`Mechanism.privatise`."""
        check_hidden(hidden, scale)
        return hidden

    def log_likelihood(self, squared: Tensor) -> Tensor:
        """See :meth:`Mechanism.log_likelihood`; the limit of vanishing noise."""
        return squared.mul_(-1e6)

    def guarantee(self, views: int = 1) -> str:
        check_views(views)
        return "none: the recipient can recover the text from what is sent"

    def per_token_epsilon(self, distance: float, views: int = 1) -> float:
        """See :meth:`Mechanism.per_token_epsilon`; infinite unless the two are equal."""
        check_views(views)
        check_distance(distance)
        return math.inf if distance > 0 else 0.0
