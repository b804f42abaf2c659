"""A mechanism in one file: isotropic Gaussian noise of standard deviation 1 / epsilon."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedsplit.privacy.levels import Level, PolicyBound
from fedsplit.privacy.mechanisms.base import (
    Mechanism,
    add_noise,
    check_distance,
    check_hidden,
    check_views,
)
from fedsplit.privacy.mechanisms.calibration import CalibrationInputs
from fedsplit.privacy.secret import SecretStream


@dataclass(frozen=True)
class Toy(Mechanism):
    """Noise without a proof, for a test."""

    name: ClassVar[str] = "toy"
    title: ClassVar[str] = "toy noise"
    level: ClassVar[Level | None] = Level(
        "epsilon",
        "1/length units",
        total="toys",
        bound=PolicyBound(
            "noise.max_toy", "Toy noise has epsilon <= {bound:g}.", "Toy noise may be of any size."
        ),
    )
    epsilon: float

    @classmethod
    def level_at(cls, ratio: float, inputs: CalibrationInputs) -> float:
        return float(f"{math.sqrt(inputs.norms.dim) / (ratio * inputs.norms.median):.4g}")

    @classmethod
    def from_settings(cls, inputs: CalibrationInputs) -> Toy:
        return cls(epsilon=cls.level_from(inputs))

    def privatise(
        self, hidden: Tensor, stream: SecretStream, scale: Tensor | None = None
    ) -> Tensor:
        check_hidden(hidden, scale)
        noise = torch.from_numpy(stream.normal(tuple(hidden.shape)) / self.epsilon)
        return add_noise(hidden, noise, scale)

    def mean_noise_norm(self, width: int) -> float:
        return math.sqrt(width) / self.epsilon

    def log_likelihood(self, squared: Tensor) -> Tensor:
        return squared.mul_(-0.5 * self.epsilon**2)

    def guarantee(self, views: int = 1) -> str:
        check_views(views)
        return f"toy noise of epsilon {self.epsilon:g}, drawn {views} time(s)"

    def per_token_epsilon(self, distance: float, views: int = 1) -> float:
        check_views(views)
        check_distance(distance)
        return self.epsilon * distance * views
