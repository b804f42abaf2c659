"""Gaussian noise shaped by the representations' covariance: a bound on mutual information.

After PAC privacy (Xiao & Devadas, CRYPTO 2023, arXiv 2210.03458, theorem 3), with the allocation
named for Split-and-Privatize's variant: l_j the eigenvalues of the representation's covariance,

    noise variance along eigenvector j:  e_j = sqrt(l_j) sum_i sqrt(l_i) / (2 B),

which minimises the total noise power among all allocations with sum_j l_j / (2 e_j) = B nats.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedsplit.config import PrivacyConfig
from fedsplit.errors import ConfigError, PrivacyError, check
from fedsplit.privacy.levels import Level, PolicyBound
from fedsplit.privacy.mechanisms.base import (
    Mechanism,
    add_noise,
    check_distance,
    check_hidden,
    check_views,
)
from fedsplit.privacy.mechanisms.calibration import (
    CalibrationInputs,
    covariance_over,
    public_vectors,
)
from fedsplit.privacy.secret import Floats, SecretStream

FLOOR = 1e-3
"""Smallest eigenvalue that is believed, relative to their mean."""


def noise_variances(eigenvalues: Floats, budget: float) -> Floats:
    """Return e_j, ``(d,) -> (d,)``; 0.5 sum log(1 + l_j/e_j) <= sum l_j/(2 e_j) = ``budget``."""
    root = np.sqrt(eigenvalues)
    return np.asarray(root * root.sum() / (2 * budget), dtype=np.float64)


def budget_from_ratio(ratio: float, median_norm: float, covariance: Tensor) -> float:
    """Return the budget whose noise is ``ratio`` times as long as the median representation.

    The root mean square length is sum_j sqrt(l_j) / sqrt(2 B).  Rounded to 4 significant digits.

    Args:
        ratio: sqrt(E||n||^2) / median ||h||, in many dimensions the same as E||n|| / median ||h||.
        median_norm: length units of the representation.
        covariance: ``(d, d)``, as given to :class:`Pac` (with its default ``floor``).
    """
    values = np.linalg.eigvalsh(covariance.detach().cpu().double().numpy())
    root = np.sqrt(np.maximum(values, FLOOR * values.mean())).sum()
    return float(f"{0.5 * (root / (ratio * median_norm)) ** 2:.4g}")


@dataclass(frozen=True)
class Pac(Mechanism):
    """Mechanism that adds Gaussian noise whose covariance follows the representations' own.

    Guarantee:
        A token's vector drawn from a distribution with at most this covariance shares at most
        ``budget`` nats of mutual information with what is sent: an average over that distribution.
    What breaks it:
        It bounds no pair of tokens: a rare token far outside the covariance can be recognised, so
        ``per_token_epsilon`` is infinite.  The covariance must cover the text that is sent.  Draws
        add up: v views share at most v budgets; so do the T tokens of a sentence.  A token with
        multiplier rho has budget / rho^2.  With public inputs (the default) the bound for the
        owner's text is what :meth:`information` says for that text's covariance; with the owner's
        own, the bound is the budget, and the noise's shape tells the server that covariance.
        With rows clipped to C, vectors of any distribution whatever share at most C^2 / (2 s^2)
        nats per draw, s the noise's standard deviation in its weakest direction (the divergence
        of two such Gaussians C apart); a noise ratio to C then is that of isotropic noise of that
        strength.
    Source:
        arXiv 2210.03458 theorem 3; eigenvalue allocation as in the module's head.  ``floor`` is
        ours: eigenvalues below ``floor`` times their mean are raised to it, which keeps the bound
        and leaves no direction without noise.

    Args:
        budget: B, nats per token and draw.
        covariance: ``(d, d)``, such as :func:`covariance_over` of public text.  Its bytes are
            part of the noise's identity: estimate once, store, reuse.
        floor: smallest eigenvalue allowed, relative to their mean.

    Raises:
        ConfigError: if ``budget`` or ``floor`` is out of range or the matrix is no covariance.
    """

    name: ClassVar[str] = "pac"
    level: ClassVar[Level | None] = Level(
        "budget",
        "nats per token",
        total="nats",
        bound=PolicyBound(
            rule="noise.max_nats",
            says="PAC noise lets out <= {bound:g} nats per token and draw, on average.",
            absent="PAC noise may be as weak as the server asks, unless noise.min_ratio bounds it.",
        ),
    )
    budget: float
    covariance: Tensor = field(repr=False, compare=False)
    floor: float = FLOOR
    _root: Tensor = field(init=False, repr=False, compare=False)
    _digest: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        ok = isinstance(self.budget, int | float) and 0 < self.budget < math.inf
        check(ok, "budget", self.budget, "> 0 (nats per token)")
        check(0 < self.floor <= 1, "floor", self.floor, "in (0, 1] (relative to the mean)")
        matrix = self.covariance.detach().cpu().double()
        shape = tuple(matrix.shape)
        square = matrix.dim() == 2 and shape[0] == shape[1] and shape[0] > 0
        check(square, "covariance.shape", shape, "(d, d)")
        symmetric = bool(torch.isfinite(matrix).all()) and torch.allclose(matrix, matrix.T)
        check(symmetric, "covariance", "matrix", "finite and symmetric")
        values, vectors = np.linalg.eigh(matrix.numpy())
        mean = float(values.mean())
        check(mean > 0 and values[0] > -1e-6 * mean, "covariance", float(values[0]), "semidefinite")
        variances = noise_variances(np.maximum(values, self.floor * mean), float(self.budget))
        # The symmetric root does not depend on the signs or order that an eigensolver picks.
        root = (vectors * np.sqrt(variances)) @ vectors.T
        digest = hashlib.sha256(matrix.numpy().astype("<f8").tobytes()).hexdigest()
        object.__setattr__(self, "budget", float(self.budget))
        object.__setattr__(self, "floor", float(self.floor))
        object.__setattr__(self, "_root", torch.from_numpy(root))
        object.__setattr__(self, "_digest", digest)

    @classmethod
    def check_settings(cls, config: PrivacyConfig) -> None:
        """See :meth:`Mechanism.check_settings`; only public noise can be denoised."""
        super().check_settings(config)
        if config.denoise != "off" and config.covariance == "own":
            raise ConfigError(
                f"privacy.denoise={config.denoise!r}: must be 'off' where privacy.covariance is "
                "'own' (the server does not know the noise's distribution)"
            )

    @classmethod
    def needs_own_text(cls, config: PrivacyConfig) -> bool:
        return config.covariance == "own"

    @classmethod
    def level_at(cls, ratio: float, inputs: CalibrationInputs) -> float:
        return _budget(ratio, inputs)

    @classmethod
    def from_settings(cls, inputs: CalibrationInputs) -> Pac:
        """See :meth:`Mechanism.from_settings`.

        Raises:
            PrivacyError: an owner asked for its own covariance and gave no text.
        """
        matrix = _covariance(inputs)
        return cls(budget=cls.level_from(inputs), covariance=matrix)

    def describe(self) -> dict[str, Any]:
        return {
            "mechanism": self.name,
            "budget": self.budget,
            "floor": self.floor,
            "covariance_sha256": self._digest,
            **self._clipped(),
        }

    def mean_noise_norm(self, width: int) -> float:
        """See :meth:`Mechanism.mean_noise_norm`; root mean square, above the mean by little.

        With clipped rows, of isotropic noise as strong as this one is in its weakest direction:
        whoever makes the bottom could put its words there.
        """
        if self.row_clip:
            return self._weakest * math.sqrt(len(self._root))
        return float(self._root.norm())

    @property
    def _weakest(self) -> float:
        """Smallest standard deviation along any direction."""
        return float(torch.linalg.eigvalsh(self._root)[0])

    def information(self, covariance: Tensor) -> float:
        """Return the nats per token and draw shared by vectors of another covariance, at most.

        0.5 log det(I + C N^-1) with N the noise's covariance: exact for Gaussian vectors, an upper
        bound for all others of that covariance.

        Args:
            covariance: C, ``(d, d)``, such as :func:`covariance_over` of an owner's text.
        """
        inverse = torch.linalg.inv(self._root)
        inside = inverse @ covariance.detach().cpu().double() @ inverse
        return float(0.5 * torch.linalg.slogdet(torch.eye(len(inside)) + inside).logabsdet)

    def privatise(
        self, hidden: Tensor, stream: SecretStream, scale: Tensor | None = None
    ) -> Tensor:
        check_hidden(hidden, scale)
        d = len(self._root)
        if hidden.shape[1] != d:
            raise PrivacyError(f"hidden.shape={tuple(hidden.shape)}: must be (T, {d})")
        noise = torch.from_numpy(stream.normal(tuple(hidden.shape))) @ self._root  # (T, d)
        return add_noise(hidden, noise, scale)

    def log_likelihood(self, squared: Tensor) -> Tensor:
        return squared.mul_(-0.5)

    def whitener(self) -> Tensor | None:
        inverse: Tensor = torch.linalg.inv(self._root)
        return inverse

    def guarantee(self, views: int = 1) -> str:
        check_views(views)
        return (
            f"per token, on average over text with this covariance: at most "
            f"{self.budget * views:.6g} nats of mutual information after {views} draw(s); no bound "
            f"for a given pair of tokens; tokens whose noise is scaled by rho: divided by rho^2"
            + self._for_any_text(views)
        )

    def _for_any_text(self, views: int) -> str:
        if not self.row_clip:
            return ""
        nats = 0.5 * views * (self.row_clip / self._weakest) ** 2
        return f"; rows are clipped to {self.row_clip:g}: at most {nats:.6g} nats for any text"

    def per_token_epsilon(self, distance: float, views: int = 1) -> float:
        """See :meth:`Mechanism.per_token_epsilon`; infinite, as there is no worst-case bound."""
        check_views(views)
        check_distance(distance)
        return math.inf if distance > 0 else 0.0


def _budget(ratio: float, inputs: CalibrationInputs) -> float:
    """Return the budget at a noise ratio; with clipped rows, the weakest direction's is meant."""
    matrix, norms = _covariance(inputs), inputs.norms
    if not norms.clip:
        return budget_from_ratio(ratio, norms.median, matrix)
    check(ratio > 0 and math.isfinite(ratio), "noise_ratio", ratio, "> 0 (E||n|| / C)")
    once = Pac(budget=1.0, covariance=matrix, row_clip=norms.clip)  # variances go with 1 / budget
    return float(f"{(once.mean_noise_norm(norms.dim) / (ratio * norms.clip)) ** 2:.4g}")


def _covariance(inputs: CalibrationInputs) -> Tensor:
    """Return the configured covariance, ``(d, d)``: an owner's from its disk where it has one."""
    c = inputs.config
    # A server does not know an owner's own covariance: the public one is its best guess.
    guess = inputs.own is None and inputs.store is None
    make = _public_covariance if c.covariance == "public" or guess else _own_covariance
    if inputs.store is None:
        return make(inputs)
    recipe = ("pac", c.covariance, c.subsamples, inputs.vocabulary)
    return inputs.store.matrix(recipe, lambda: make(inputs))


def _public_covariance(inputs: CalibrationInputs) -> Tensor:
    vectors = public_vectors(inputs.bottom, inputs.vocabulary, sequences=512)  # (512, 16, d)
    return covariance_over(list(vectors), inputs.config.subsamples)


@torch.no_grad()
def _own_covariance(inputs: CalibrationInputs) -> Tensor:
    if inputs.own is None:
        raise PrivacyError(
            "privacy.covariance='own': must be given the owner's text, which it is estimated on"
        )
    rows = []
    for ids in inputs.own[:4096]:
        batch = ids.unsqueeze(0)
        rows.append(inputs.bottom(batch, torch.ones_like(batch))[0].float())
    return covariance_over(rows, inputs.config.subsamples)
