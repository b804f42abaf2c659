"""Clipped gradient rows with Gaussian noise, one row per sample or token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedsplit.config import LabelsConfig
from fedsplit.errors import check
from fedsplit.privacy.labels.base import LabelProtection, check_gradients
from fedsplit.privacy.levels import Level, PolicyBound
from fedsplit.privacy.mechanisms.gaussian import mean_norm
from fedsplit.privacy.secret import SecretStream
from fedsplit.tasks import Task


@dataclass(frozen=True)
class RowNoise(LabelProtection):
    """Protection that clips each row's own gradient to C and adds N(0, sigma^2 I).

    Rows are those of a mean loss over N targets; C and sigma are in units of one target's own
    loss, so that N changes nothing of what a row tells.  sigma is such that the noise is
    ``noise_ratio`` times C long on average.

    Guarantee:
        A row and draw give at most (d/2) ln(1 + C^2 / (d sigma^2)) nats of information about its
        label, about d / (2 noise_ratio^2), on average over any distribution of labels (capacity
        of the Gaussian channel); any two labels' densities differ as N(0, sigma^2) shifted by at
        most 2 C.  The strongest reader of single rows is known: maximum a posteriori under this
        law with the model's own prediction as prior
        (:mod:`fedsplit.attacks.gradients.token_recovery`).
    What breaks it:
        Every pass over a text draws again, as the output that the gradient answers has changed:
        information adds up over passes.  A prior better than the model's prediction, such as the
        representations of the same text.

    Args:
        noise_ratio: E||noise|| / C.
        gradient_clip: C, norm of one target's own gradient.
    """

    name: ClassVar[str] = "row-noise"
    level: ClassVar[Level | None] = Level(
        "noise_ratio",
        "mean length of the noise over the clip",
        bound=PolicyBound(
            rule="labels.min_noise_ratio",
            says="Noise on gradient rows is at least {bound:g} times as long as their clip.",
            absent="Noise on gradient rows may be as weak as the server asks.",
            least=True,
        ),
    )
    takes_tokens: ClassVar[bool] = True
    noise_ratio: float
    gradient_clip: float

    def __post_init__(self) -> None:
        for name in ("noise_ratio", "gradient_clip"):
            value = getattr(self, name)
            check(value > 0 and math.isfinite(value), name, value, "> 0 and finite")

    @classmethod
    def fits(cls, task: type[Task]) -> bool:
        """Return True: a row is clipped and gets noise whatever it is the gradient of."""
        return True

    @classmethod
    def from_settings(cls, config: LabelsConfig) -> RowNoise:
        return cls(config.noise_ratio, config.gradient_clip)

    def sigma(self, width: int) -> float:
        """Return the noise's standard deviation per coordinate, in units of one target's loss."""
        return self.noise_ratio * self.gradient_clip / mean_norm(width)

    def row_law(self, width: int) -> tuple[str, float, float]:
        return "gaussian", self.sigma(width), self.gradient_clip

    def information(self, width: int) -> float:
        """Return the bound on one row's and draw's information about its label, in nats."""
        signal = (self.gradient_clip / self.sigma(width)) ** 2
        return 0.5 * width * math.log1p(signal / width)

    def guarantee(self) -> str:
        return (
            f"gradient rows clipped to {self.gradient_clip:g} with Gaussian noise "
            f"{self.noise_ratio:g} times as long: at most {0.5 / self.noise_ratio**2:.2g} nats per "
            "coordinate, row and pass about a label"
        )

    def perturb(self, rows: Tensor, labels: Tensor, share: float, stream: SecretStream) -> Tensor:
        check_gradients(rows, labels)
        own = rows.to(torch.float64) * len(rows)  # of one target's own loss
        norms = own.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        clipped = own * (self.gradient_clip / norms).clamp(max=1.0)
        noise = torch.from_numpy(stream.normal(tuple(rows.shape))) * self.sigma(rows.shape[1])
        sent: Tensor = (clipped + noise) / len(rows)
        return sent.to(rows.dtype)
