"""What DP-SGD on an owner's own parameters has cost so far, by Opacus's accountants."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from fedsplit.errors import ConfigError, PrivacyError

if TYPE_CHECKING:  # whoever reads a ledger needs no NumPy
    import numpy as np
    import numpy.typing as npt

ACCOUNTANTS = ("rdp", "prv")


@dataclass(frozen=True)
class NoisySteps:
    """Steps of DP-SGD with one noise.

    Attributes:
        noise_multiplier: standard deviation in units of the clipping bound, > 0.
        sample_rate: batch size / samples, in (0, 1].
        steps: number of noisy steps, >= 0.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int

    @property
    def key(self) -> str:
        """What tells this noise from another, exactly."""
        return f"{self.noise_multiplier!r} {self.sample_rate!r}"

    @classmethod
    def from_key(cls, key: str, steps: int) -> NoisySteps:
        """Return steps with the noise that :attr:`key` names."""
        noise, rate = key.split()
        return cls(float(noise), float(rate), int(steps))

    def to_json(self) -> dict[str, Any]:
        """Return everything, JSON-able."""
        return {"multiplier": self.noise_multiplier, "rate": self.sample_rate, "steps": self.steps}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> NoisySteps:
        """Return what :meth:`to_json` was taken of."""
        return cls(float(content["multiplier"]), float(content["rate"]), int(content["steps"]))


def spent_epsilon(
    noise_multiplier: float,
    sample_rate: float,
    steps: int,
    delta: float,
    accountant: str = "rdp",
) -> float:
    """Return epsilon of the sampled Gaussian mechanism after ``steps`` steps.

    Guarantee:
        (epsilon, delta)-DP for adding or removing one sample of one owner, of the parameters after
        ``steps`` steps, **if each step drew every sample with probability** ``sample_rate``
        **independently** (Poisson sampling; Abadi et al., arXiv 1607.00133; Mironov et al., arXiv
        1908.10530).  Owners here pass over shuffled data instead, as nearly all DP-SGD is run in
        practice: the figure is then the customary estimate, not a proof, and none at all against
        whoever chooses the batches.  With ``sample_rate`` 1 the bound holds for any order of
        batches, known or not, with ``steps`` the steps that one sample is in at most: an owner's
        rules and ledger count so.

    Args:
        noise_multiplier: standard deviation in units of the clipping bound, > 0.
        sample_rate: batch size / samples, in (0, 1].
        steps: noisy steps taken, >= 0.
        delta: in (0, 1).
        accountant: ``rdp`` or ``prv`` (tighter, slower).

    Raises:
        PrivacyError: an argument out of range.
        ConfigError: Opacus is not installed (the extra ``dp``).
    """
    return composed_epsilon([NoisySteps(noise_multiplier, sample_rate, steps)], delta, accountant)


def composed_epsilon(history: Sequence[NoisySteps], delta: float, accountant: str = "rdp") -> float:
    """Return epsilon of all the steps of ``history`` together, of whatever runs and models.

    Guarantee:
        As :func:`spent_epsilon`, for one owner whose samples took part in all of them.

    Args:
        history: noisy steps of one owner; an infinite epsilon is returned where they cost more than
            the accountant can tell.
        delta: in (0, 1).
        accountant: ``rdp`` or ``prv`` (tighter, slower).

    Raises:
        PrivacyError: an argument out of range.
        ConfigError: Opacus is not installed (the extra ``dp``).
    """
    for part in history:
        good = part.noise_multiplier > 0 and 0 < part.sample_rate <= 1 and part.steps >= 0
        if not good or not 0 < delta < 1 or accountant not in ACCOUNTANTS:
            raise PrivacyError(
                f"{part}, delta={delta}, accountant={accountant!r}: must be > 0, in (0, 1], >= 0, "
                f"in (0, 1) and one of {', '.join(ACCOUNTANTS)}"
            )
    taken = [part for part in history if part.steps]
    if not taken:
        return 0.0
    try:
        from opacus.accountants import PRVAccountant
    except ImportError as error:
        raise ConfigError(
            f"dp.noise-multiplier={taken[0].noise_multiplier}: must be 0 without {MISSING}"
        ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the best order is at an end of the list: still a bound
        if accountant == "rdp":
            spent = _renyi_epsilon(taken, delta)
        else:
            book = PRVAccountant()
            book.history = [(part.noise_multiplier, part.sample_rate, part.steps) for part in taken]
            spent = float(book.get_epsilon(delta=delta))
    return spent if math.isfinite(spent) else math.inf


def _renyi_epsilon(history: Sequence[NoisySteps], delta: float) -> float:
    """Return what Opacus's ``RDPAccountant`` says of ``history``.

    It would compute every order's bound for one step anew at each call.
    """
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis.rdp import get_privacy_spent

    total = sum(
        part.steps * _renyi_step(part.noise_multiplier, part.sample_rate) for part in history
    )
    spent, _ = get_privacy_spent(orders=RDPAccountant.DEFAULT_ALPHAS, rdp=total, delta=delta)
    return float(spent)


@lru_cache(maxsize=1024)
def _renyi_step(noise_multiplier: float, sample_rate: float) -> npt.NDArray[np.float64]:
    """Return the Renyi divergence of one step at each of Opacus's orders, (orders,)."""
    import numpy as np
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis.rdp import compute_rdp

    orders = RDPAccountant.DEFAULT_ALPHAS
    found = compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=orders)
    return np.asarray(found, dtype=np.float64)


MISSING = "opacus (pip install 'fedsplit[dp]')"
