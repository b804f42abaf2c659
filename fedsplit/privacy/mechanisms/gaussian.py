"""Gaussian noise calibrated exactly: (epsilon, delta)-differential privacy per token, any epsilon.

Balle & Wang, ICML 2018, arXiv 1805.06530, theorem 8: with L2 sensitivity D, noise N(0, sigma^2 I)
is (epsilon, delta)-DP if and only if

    Phi(D/(2 sigma) - epsilon sigma/D) - e^epsilon Phi(-D/(2 sigma) - epsilon sigma/D) <= delta.

The classical sigma = D sqrt(2 log(1.25/delta))/epsilon is valid for epsilon < 1 alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from scipy.optimize import brentq
from scipy.special import log_ndtr
from torch import Tensor, nn

from fedsplit.config import PrivacyConfig
from fedsplit.errors import check
from fedsplit.privacy.levels import Level, PolicyBound
from fedsplit.privacy.mechanisms.base import (
    Mechanism,
    add_noise,
    check_distance,
    check_hidden,
    check_views,
)
from fedsplit.privacy.mechanisms.calibration import CalibrationInputs, Norms
from fedsplit.privacy.secret import SecretStream


def gaussian_delta(epsilon: float, ratio: float) -> float:
    """Return the smallest delta at ``epsilon`` (theorem 8).

    Args:
        epsilon: nats.
        ratio: noise over sensitivity, sigma / D.
    """
    a, b = 0.5 / ratio, epsilon * ratio
    first, second = float(log_ndtr(a - b)), epsilon + float(log_ndtr(-a - b))
    return math.exp(first) * -math.expm1(second - first) if second < first else 0.0


def gaussian_ratio(epsilon: float, delta: float) -> float:
    """Return the smallest sigma / D that is (epsilon, delta)-DP, to 12 digits."""

    def excess(log_ratio: float) -> float:
        return math.log(max(gaussian_delta(epsilon, math.exp(log_ratio)), 1e-300) / delta)

    low, high = -1.0, 1.0
    while excess(low) < 0:
        low -= 2.0
    while excess(high) > 0:
        high += 2.0
    return math.exp(brentq(excess, low, high, xtol=1e-13)) * (1 + 1e-12)


def gaussian_epsilon(ratio: float, delta: float) -> float:
    """Return the smallest epsilon >= 0 at which noise of that ``sigma / D`` has ``delta``."""
    if gaussian_delta(0.0, ratio) <= delta:
        return 0.0
    high = 1.0
    while gaussian_delta(high, ratio) > delta:
        high *= 2.0
    return float(brentq(lambda e: gaussian_delta(e, ratio) - delta, 0.0, high, xtol=1e-12))


def mean_norm(d: int) -> float:
    """Return E||n|| of a standard normal vector in d dimensions, about sqrt(d)."""
    return math.sqrt(2) * math.exp(math.lgamma(0.5 * (d + 1)) - math.lgamma(0.5 * d))


def epsilon_from_ratio(
    ratio: float, d: int, median_norm: float, clip: float, delta: float
) -> float:
    """Return the epsilon whose mean noise norm is ``ratio`` times the median representation norm.

    Rounded to 4 significant digits, for the reason given at
    :func:`fedsplit.privacy.mechanisms.dchi.eta_from_ratio`.

    Args:
        ratio: E||n|| / median ||h||.
        d: representation dimension.
        median_norm: length units of the representation.
        clip: L2 bound of a token's vector, same units.
        delta: in (0, 1).

    Raises:
        ConfigError: for noise so long that epsilon would be 0 at this delta.
    """
    sigma = ratio * median_norm / mean_norm(d)
    epsilon = gaussian_epsilon(sigma / (2 * clip), delta)
    bound = f"small enough for an epsilon > 0 at delta = {delta:g}"
    check(epsilon > 0, "privacy.noise-ratio", ratio, bound)
    return float(f"{epsilon:.4g}")


@dataclass(frozen=True)
class Gaussian(Mechanism):
    """Mechanism that clips every token's vector to ``clip`` and adds isotropic Gaussian noise.

    Guarantee:
        (epsilon, delta)-differential privacy, locally and per token: for any two tokens in that
        place, whatever their vectors, with sensitivity D = 2 clip.
    What breaks it:
        Draws compose: v views have the noise of one at sigma / sqrt(v).  It protects one token,
        not a sentence: T tokens together have sensitivity D sqrt(T).  A token with multiplier rho
        has sigma rho.  A guarantee for *every* pair of tokens needs noise far above the signal at
        small epsilon (d = 384: the noise is sqrt(d) sigma long); d_chi only asks that near tokens
        be confused.  float32 and bf16 rounding apply as for ``dchi``.
    Source:
        arXiv 1805.06530 theorem 8 and algorithm 1.

    Args:
        epsilon: nats, > 0.
        delta: in (0, 1); far below one over the number of tokens.
        clip: L2 bound of a token's vector (length units of the representation).

    Raises:
        ConfigError: if a parameter is out of range.
    """

    name: ClassVar[str] = "gaussian"
    level: ClassVar[Level | None] = Level(
        "epsilon",
        "nats per token",
        total="epsilon",
        bound=PolicyBound(
            rule="noise.max_epsilon",
            says="Gaussian noise has epsilon <= {bound:g} nats per token and draw.",
            absent="Gaussian noise may be as weak as the server asks, unless noise.min_ratio "
            "bounds it.",
        ),
    )
    epsilon: float
    delta: float
    clip: float

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("epsilon", "delta", "clip"):
            value = getattr(self, field)
            ok = isinstance(value, int | float) and value > 0 and math.isfinite(value)
            unit = {"epsilon": "nats", "delta": "probability", "clip": "representation units"}
            check(ok, field, value, f"> 0 ({unit[field]})")
            object.__setattr__(self, field, float(value))
        check(self.delta < 1, "delta", self.delta, "< 1 (probability)")

    @classmethod
    def level_at(cls, ratio: float, inputs: CalibrationInputs) -> float:
        norms, c = inputs.norms, inputs.config
        return epsilon_from_ratio(ratio, norms.dim, norms.length, gaussian_clip(inputs), c.delta)

    @classmethod
    def from_settings(cls, inputs: CalibrationInputs) -> Gaussian:
        """See :meth:`Mechanism.from_settings`; ``clip`` 0 is the largest norm of public inputs."""
        return cls(
            epsilon=cls.level_from(inputs), delta=inputs.config.delta, clip=gaussian_clip(inputs)
        )

    @classmethod
    def public_settings(cls, config: PrivacyConfig) -> dict[str, float]:
        told = super().public_settings(config)
        if config.clip:
            told["clip"] = config.clip
        return told | {"delta": config.delta} if config.epsilon else told

    @cached_property
    def sigma(self) -> float:
        """Standard deviation per coordinate (length units of the representation)."""
        return gaussian_ratio(self.epsilon, self.delta) * 2 * self.clip

    def privatise(
        self, hidden: Tensor, stream: SecretStream, scale: Tensor | None = None
    ) -> Tensor:
        """See :meth:`Mechanism.privatise`; the gradient passes through the clipping."""
        check_hidden(hidden, scale)
        norm = hidden.norm(dim=1, keepdim=True)
        clipped = hidden * (self.clip / norm.clamp(min=torch.finfo(norm.dtype).tiny)).clamp(max=1)
        noise = torch.from_numpy(stream.normal(tuple(hidden.shape)) * self.sigma)
        return add_noise(clipped, noise, scale)

    def mean_noise_norm(self, width: int) -> float:
        return self.sigma * mean_norm(width)

    def covered_norms(self, bottom: nn.Module, vocabulary: int) -> Norms:
        """See :meth:`Mechanism.covered_norms`; a small ``clip`` shortens noise and vector alike."""
        norms = super().covered_norms(bottom, vocabulary)
        return replace(norms, median=min(norms.median, self.clip))

    @property
    def sent_norm(self) -> float:
        """See :meth:`Mechanism.sent_norm`; ``clip`` is a clip of its own."""
        return min(self.clip, self.row_clip) if self.row_clip else self.clip

    def log_likelihood(self, squared: Tensor) -> Tensor:
        return squared.mul_(-0.5 / self.sigma**2)

    def guarantee(self, views: int = 1) -> str:
        check_views(views)
        epsilon = self.per_token_epsilon(math.inf, views)
        return (
            f"per token: ({epsilon:.6g}, {self.delta:.3g})-differential privacy between any two "
            f"vectors clipped to {self.clip:g} after {views} draw(s), sigma = {self.sigma:.4g}; "
            f"tokens whose noise is scaled by rho have sigma times rho"
        )

    def per_token_epsilon(self, distance: float, views: int = 1) -> float:
        """See :meth:`Mechanism.per_token_epsilon`; the exact epsilon at this ``delta``."""
        check_views(views)
        check_distance(distance)
        distance = min(distance, 2 * self.clip)
        if distance == 0:
            return 0.0
        return gaussian_epsilon(self.sigma / (distance * math.sqrt(views)), self.delta)


def gaussian_clip(inputs: CalibrationInputs) -> float:
    """Return the bound that the noise is calibrated to: no more than C where rows are clipped."""
    norms = inputs.norms
    asked = inputs.config.clip or norms.clip or norms.largest
    return min(asked, norms.clip) if norms.clip else asked
