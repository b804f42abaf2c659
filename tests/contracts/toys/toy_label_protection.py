"""A label protection in one file: noise on gradients of classes and of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedsplit.config import LabelsConfig
from fedsplit.privacy.labels.base import LabelProtection, check_gradients
from fedsplit.privacy.levels import Level, PolicyBound
from fedsplit.privacy.secret import SecretStream
from fedsplit.tasks import Task


@dataclass(frozen=True)
class Blur(LabelProtection):
    """Noise without a proof, for a test."""

    name: ClassVar[str] = "blur"
    level: ClassVar[Level | None] = Level(
        "noise_power",
        "variance per coordinate",
        bound=PolicyBound(
            "labels.min_blur", "Blur is at least {bound:g}.", "Blur may be nothing.", least=True
        ),
    )
    takes_tokens: ClassVar[bool] = True
    power: float

    @classmethod
    def fits(cls, task: type[Task]) -> bool:
        return True

    @classmethod
    def from_settings(cls, config: LabelsConfig) -> Blur:
        return cls(config.noise_power)

    def guarantee(self) -> str:
        return f"gradients with noise of variance {self.power:g}, for a test"

    def perturb(self, rows: Tensor, labels: Tensor, share: float, stream: SecretStream) -> Tensor:
        check_gradients(rows, labels)
        noise = torch.from_numpy(stream.normal(tuple(rows.shape)))
        return (rows + self.power**0.5 * noise).to(rows.dtype)
