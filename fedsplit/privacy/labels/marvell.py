"""Marvell: optimal Gaussian noise on two-class gradients (Li et al., ICLR 2022, arXiv 2102.08504).

Model of the gradients (section 4.2): g | y ~ N(mean_y, v_y I_d).  Noise N(0, S_y) per class is
chosen to minimise sumKL = KL(P1 || P0) + KL(P0 || P1) of the perturbed gradients under the budget
p tr S_1 + (1 - p) tr S_0 <= P.  By theorem 2 the optimum has S_y = (l1_y - l2_y) D D^T + l2_y I
with D = (mean_1 - mean_0) / ||mean_1 - mean_0||, so four numbers remain.  In a = log(l + v)
objective and budget are sums of exponentials of linear functions: a convex (geometric) program,
whose local optimum is the global one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize
from torch import Tensor

from fedsplit.config import LabelsConfig, RunConfig
from fedsplit.errors import PrivacyError, check
from fedsplit.privacy.labels.base import LabelProtection, check_gradients
from fedsplit.privacy.levels import Level, PolicyBound
from fedsplit.privacy.secret import SecretStream

Floats = npt.NDArray[np.float64]
# Classes without spread would need infinitely little noise to be told apart: a floor on v_y, as a
# share of the squared distance of the means.
FLOOR = 1e-6


@dataclass(frozen=True)
class Spectrum:
    """Noise variances per class: along the means' difference, and in every other direction.

    Attributes:
        along: (class 0, class 1), l1.
        across: (class 0, class 1), l2 <= l1.
        sum_kl: of the perturbed gradients (nats).
    """

    along: tuple[float, float]
    across: tuple[float, float]
    sum_kl: float


def sum_kl(spectrum_or_levels: Floats, spread: tuple[float, float], d: int, gap: float) -> float:
    """Return KL(P1 || P0) + KL(P0 || P1) in nats.

    Args:
        spectrum_or_levels: (l1_0, l2_0, l1_1, l2_1).
        spread: (v_0, v_1), variances per coordinate of the clean gradients.
        d: width.
        gap: squared distance of the means.
    """
    a0, b0, a1, b1 = spectrum_or_levels + np.array([spread[0], spread[0], spread[1], spread[1]])
    along = (a0 + gap) / a1 + (a1 + gap) / a0
    across = (d - 1) * (b0 / b1 + b1 / b0) if d > 1 else 0.0
    return float(0.5 * (along + across - 2 * d))


def optimal_spectrum(
    spread: tuple[float, float], d: int, gap: float, share: float, power: float
) -> Spectrum:
    """Return the noise that minimises sumKL within the budget.

    Args:
        spread: (v_0, v_1) > 0.
        d: width, >= 1.
        gap: squared distance of the means, > 0.
        share: p, of class 1, in (0, 1).
        power: P >= 0, in the gradients' squared units.

    Raises:
        PrivacyError: for arguments out of range, or if the solver finds no feasible point.
    """
    if not (min(spread) > 0 and d >= 1 and gap > 0 and 0 < share < 1 and power >= 0):
        raise PrivacyError(
            f"Marvell: spread={spread}, d={d}, gap={gap}, share={share}: must be > 0"
        )
    v = np.array([spread[0], spread[0], spread[1], spread[1]]) / gap
    budget = power / gap
    many = float(d - 1)
    # trace per unit of (l1_0, l2_0, l1_1, l2_1), in the budget
    cost = np.array([1 - share, many * (1 - share), share, many * share])
    spent = float(cost @ v)

    # Logarithms of both keep the problem convex and its numbers near 1, whatever v and d.
    def objective(a: Floats) -> tuple[float, Floats]:
        a0, b0, a1, b1 = a
        t = np.exp([a0 - a1, a1 - a0, -a1, -a0, b0 - b1, b1 - b0])
        value = t[0] + t[1] + t[2] + t[3] + many * (t[4] + t[5])
        slope = [t[0] - t[1] - t[3], many * (t[4] - t[5]), t[1] - t[0] - t[2], many * (t[5] - t[4])]
        return math.log(value), np.array(slope) / value

    def room(a: Floats) -> float:
        return math.log(budget + spent) - math.log(float(cost @ np.exp(a)))

    def room_slope(a: Floats) -> Floats:
        return np.asarray(-cost * np.exp(a) / float(cost @ np.exp(a)))

    constraints = [
        {"type": "ineq", "fun": room, "jac": room_slope},
        {"type": "ineq", "fun": lambda a: a[0] - a[1], "jac": lambda a: np.array([1, -1, 0, 0.0])},
        {"type": "ineq", "fun": lambda a: a[2] - a[3], "jac": lambda a: np.array([0, 0, 1, -1.0])},
    ]
    # Feasible to start with: half of the budget, all along the difference.
    start = np.log(v + 0.5 * budget * np.array([1.0, 0.0, 1.0, 0.0]))
    low = np.log(v)
    top = np.log(v + budget / np.maximum(cost, 1e-12))
    if d == 1:
        top[1], top[3] = low[1], low[3]
    found = minimize(
        objective,
        start,
        jac=True,
        bounds=list(zip(low, np.maximum(top, low), strict=True)),
        constraints=constraints,
        method="SLSQP",
        options={"maxiter": 300, "ftol": 1e-12},
    )
    levels = np.maximum(np.exp(found.x) - v, 0.0)
    over = float(cost @ levels)
    if over > budget:  # the solver's tolerance, never more power than allowed
        levels *= budget / over
    levels[1], levels[3] = min(levels[0], levels[1]), min(levels[2], levels[3])
    if not np.isfinite(levels).all():
        raise PrivacyError(
            f"Marvell: no noise found for spread={spread}, gap={gap}: {found.message}"
        )
    scaled = levels * gap
    return Spectrum(
        (float(scaled[0]), float(scaled[2])),
        (float(scaled[1]), float(scaled[3])),
        sum_kl(scaled, spread, d, gap),
    )


@dataclass(frozen=True)
class Marvell(LabelProtection):
    """Protection by noise per class that makes two classes' gradients as alike as the power allows.

    The batch's gradients give means and spreads.  A batch of one class alone takes the other to be
    its mirror image (opposite mean, equal spread): without noise it would show all of its labels.
    Gradients of two logits sum to zero, so their noise does as well (d = 1).

    Guarantee:
        Against whoever ranks the gradients of one batch: if sumKL <= e < 4 (nats) then AUC <=
        1/2 + sqrt(e)/2 - e/8 (theorem 1), under the Gaussian model.  No label-DP.

    What breaks it:
        Every epoch shows another noisy gradient of the same label: evidence adds up over epochs.
        Gradients that are not Gaussian.  A server that sends many slightly different outputs gets
        as many independent draws; the same output gets the same draw.

    Args:
        power: s; the expected squared noise norm is at most s times the squared distance of the
            two classes' mean gradients.
    """

    name: ClassVar[str] = "marvell"
    level: ClassVar[Level | None] = Level(
        "noise_power",
        "multiple of the squared distance of the classes' mean gradients",
        bound=PolicyBound(
            rule="labels.min_noise_power",
            says="Marvell's noise power is at least {bound:g}.",
            absent="Marvell's noise may be as weak as the server asks.",
            least=True,
        ),
    )
    power: float

    def __post_init__(self) -> None:
        good = self.power > 0 and math.isfinite(self.power)
        check(good, "power", self.power, "> 0 and finite (multiple of the squared distance)")

    @classmethod
    def from_settings(cls, config: LabelsConfig) -> Marvell:
        return cls(config.noise_power)

    @classmethod
    def check_settings(cls, config: RunConfig) -> None:
        """See :meth:`LabelProtection.check_settings`; its optimum is for two classes."""
        super().check_settings(config)
        check(
            config.model.labels == 2,
            "labels.protection",
            config.labels.protection,
            f"used with model.labels=2 (its optimum is for two classes, not "
            f"{config.model.labels}); randomised-response and max-norm take any number",
        )

    def guarantee(self) -> str:
        return (
            f"two-class gradients made alike within {self.power:g} times the squared distance of "
            "their means (sumKL minimised per batch; no label-DP, evidence adds up over epochs)"
        )

    def perturb(self, rows: Tensor, labels: Tensor, share: float, stream: SecretStream) -> Tensor:
        """See :meth:`LabelProtection.perturb`.

        Raises:
            PrivacyError: also for labels other than 0 and 1.
        """
        check_gradients(rows, labels)
        if not set(labels.tolist()) <= {0, 1}:
            raise PrivacyError(f"labels up to {int(labels.max())}: must be 0 or 1 (two classes)")
        values = rows.to(torch.float64)
        if rows.shape[1] == 2 and float(values.sum(1).abs().max()) <= 1e-4 * float(
            values.abs().max()
        ):
            axis = values.new_tensor([-1.0, 1.0]) / math.sqrt(2.0)
            noise = self._noise((values @ axis)[:, None], labels, share, stream) * axis
        else:
            noise = self._noise(values, labels, share, stream)
        return (values + noise).to(rows.dtype)

    def _noise(self, rows: Tensor, labels: Tensor, share: float, stream: SecretStream) -> Tensor:
        width = rows.shape[1]
        means: list[Tensor | None] = []
        spreads: list[float] = []
        for label in (0, 1):
            own = rows[labels == label]
            mean = own.mean(0) if len(own) else None
            means.append(mean)
            spreads.append(0.0 if mean is None else float((own - mean).square().sum(1).mean()))
        if means[0] is None:
            means[0], spreads[0] = -_known(means[1]), spreads[1]
        elif means[1] is None:
            means[1], spreads[1] = -means[0], spreads[0]
        difference = _known(means[1]) - _known(means[0])
        gap = float(difference.square().sum())
        draw = torch.from_numpy(stream.normal((len(rows), width)))
        if gap <= 1e-300:
            return torch.zeros_like(rows)
        floor = FLOOR * gap / width
        spread = (max(spreads[0] / width, floor), max(spreads[1] / width, floor))
        share = min(max(share, 1e-3), 1 - 1e-3)
        found = optimal_spectrum(spread, width, gap, share, self.power * gap)
        along = torch.tensor(found.along, dtype=torch.float64).sqrt()[labels][:, None]  # (N, 1)
        across = torch.tensor(found.across, dtype=torch.float64).sqrt()[labels][:, None]
        axis = difference / math.sqrt(gap)  # (d,)
        return across * draw + (along - across) * (draw @ axis)[:, None] * axis


def _known(mean: Tensor | None) -> Tensor:
    assert mean is not None, "a batch has rows of at least one class"
    return mean
