"""d_chi-privacy: noise with density proportional to exp(-eta ||n||) on each token's vector.

Split-and-Privatize, arXiv 2312.15603, section 3 (mechanism); Feyisetan et al., WSDM 2020,
arXiv 1910.08902, section 2.6 (the sampler: uniform direction, Gamma radius).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedsplit.errors import check
from fedsplit.privacy.levels import Level, PolicyBound
from fedsplit.privacy.mechanisms.base import (
    Mechanism,
    add_noise,
    check_hidden,
    check_views,
)
from fedsplit.privacy.mechanisms.calibration import CalibrationInputs
from fedsplit.privacy.secret import Floats, SecretStream

MAX_ETA = PolicyBound(
    rule="noise.max_eta",
    says="d_chi noise has eta <= {bound:g}; no noise, and mechanisms that no rule bounds, "
    "are refused.",
    absent="The server chooses how weak d_chi noise is, unless noise.min_ratio bounds it.",
)


def sample_dchi(stream: SecretStream, tokens: int, d: int, eta: float) -> Floats:
    """Draw one noise vector per token from p(n) proportional to exp(-eta ||n||).

    In polar coordinates that density is exactly: direction uniform on the sphere, radius
    Gamma(shape=d, rate=eta), independent of each other and of the other tokens.

    Args:
        stream: where the numbers come from; consumes ``tokens * (d + 1)`` words.
        tokens: number of vectors T.
        d: their dimension.
        eta: 1/length units of the representation.

    Returns:
        float64, ``(T, d)``; mean norm d/eta, standard deviation of the norm sqrt(d)/eta.
    """
    radius = stream.gamma(float(d), tokens)  # (T,), rate 1
    noise = stream.normal((tokens, d))  # (T, d); a normal vector's direction is uniform
    radius /= eta * np.sqrt(np.einsum("td,td->t", noise, noise))
    noise *= radius[:, None]
    return noise


def eta_from_ratio(ratio: float, d: int, median_norm: float) -> float:
    """Return the eta whose mean noise norm is ``ratio`` times the median representation norm.

    ``ratio = E||n|| / median||h|| = (d / eta) / median_norm``.  Unlike eta, the ratio means the
    same for every model: around 1 the noise is as long as the signal.  Rounded to 4 significant
    digits: eta is part of the noise's identity, and a median computed by another number of threads
    must not give a sample a second draw.

    Raises:
        ConfigError: unless all three are positive and finite.
    """
    check(ratio > 0 and math.isfinite(ratio), "noise_ratio", ratio, "> 0 (E||n|| / median ||h||)")
    check(d >= 1, "d", d, ">= 1 (representation dimension)")
    check(
        median_norm > 0 and math.isfinite(median_norm),
        "median_norm",
        median_norm,
        "> 0 (length units of the representation)",
    )
    return float(f"{d / (ratio * median_norm):.4g}")


@dataclass(frozen=True)
class DChi(Mechanism):
    """Mechanism that adds d_chi noise to every token's vector, once per sample.

    Guarantee:
        For one token and one draw, the output densities for representations h and h' differ by at
        most a factor exp(eta ||h - h'||).  Post-processing (quantising, denoising) costs nothing.
        With rows clipped to C that factor is at most exp(2 eta C) for any two tokens, whatever
        bottom made their vectors: at a noise ratio r to C that is exp(2 d / r).
    What breaks it:
        It composes: v fresh draws for the same token cost v eta, and a sentence of T tokens is
        protected token by token, not as a whole.  eta is not portable: it counts relative to the
        distances between representations, so the same eta is strong on one model and none on
        another (see :func:`eta_from_ratio`).  A token with multiplier rho has eta/rho, and none at
        rho = 0.  Context helps an attacker: neighbouring tokens' vectors are noised independently,
        but language is not.  Noise is sampled in float64 with 52-bit uniforms and the sum is
        rounded to the representation's dtype; the ratio bound holds up to that rounding (Mironov,
        CCS 2012), so send a coarser type than the one computed in (bf16, int8) where it matters.
    Source:
        arXiv 2312.15603 section 3; arXiv 1910.08902 section 2.6.

    Args:
        eta: privacy parameter per unit of L2 distance (1/length units of the representation).

    Raises:
        ConfigError: if ``eta`` is not positive and finite.
    """

    name: ClassVar[str] = "dchi"
    title: ClassVar[str] = "d_chi"
    level: ClassVar[Level | None] = Level(
        "eta", "1/length units of the bottom's output", total="eta", bound=MAX_ETA
    )
    eta: float

    def __post_init__(self) -> None:
        super().__post_init__()
        ok = isinstance(self.eta, int | float) and self.eta > 0 and math.isfinite(self.eta)
        check(ok, "eta", self.eta, "> 0 (1/length units of the representation)")
        object.__setattr__(self, "eta", float(self.eta))  # 8 and 8.0 are the same mechanism

    @classmethod
    def level_at(cls, ratio: float, inputs: CalibrationInputs) -> float:
        norms = cls.public_norms(inputs)
        return eta_from_ratio(ratio, norms.dim, norms.length)

    @classmethod
    def from_settings(cls, inputs: CalibrationInputs) -> DChi:
        return cls(eta=cls.level_from(inputs))

    def privatise(
        self, hidden: Tensor, stream: SecretStream, scale: Tensor | None = None
    ) -> Tensor:
        check_hidden(hidden, scale)
        tokens, d = hidden.shape
        noise = torch.from_numpy(sample_dchi(stream, tokens, d, self.eta))
        return add_noise(hidden, noise, scale)

    def mean_noise_norm(self, width: int) -> float:
        """See :meth:`Mechanism.mean_noise_norm`; the mean of the Gamma radius."""
        return width / self.eta

    def log_likelihood(self, squared: Tensor) -> Tensor:
        """See :meth:`Mechanism.log_likelihood`; -eta times the distance."""
        return squared.sqrt_().mul_(-self.eta)

    def guarantee(self, views: int = 1) -> str:
        check_views(views)
        return (
            f"per token: likelihoods of any output under representations h and h' differ by at "
            f"most exp({self.eta * views:.6g} * ||h - h'||) after {views} draw(s); tokens whose "
            f"noise is scaled by rho have that exponent divided by rho{self.clipping()}"
        )

    def per_token_epsilon(self, distance: float, views: int = 1) -> float:
        """See :meth:`Mechanism.per_token_epsilon`; eta * distance * views."""
        check_views(views)
        return self.eta * self.distance(distance) * views
