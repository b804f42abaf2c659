"""What DP-SGD on an owner's own parameters has cost so far, by Opacus's accountants."""

from __future__ import annotations

import warnings

from fedsplit.errors import ConfigError, PrivacyError

ACCOUNTANTS = ("rdp", "prv")


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
        practice: the figure is then the customary estimate, not a proof.  With ``sample_rate`` 1
        the bound holds for any order of batches: each sample counted as if it were in every step.

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
    good = noise_multiplier > 0 and 0 < sample_rate <= 1 and steps >= 0 and 0 < delta < 1
    if not good or accountant not in ACCOUNTANTS:
        raise PrivacyError(
            f"noise_multiplier={noise_multiplier}, sample_rate={sample_rate}, steps={steps}, "
            f"delta={delta}, accountant={accountant!r}: must be > 0, in (0, 1], >= 0, in (0, 1) "
            f"and one of {', '.join(ACCOUNTANTS)}"
        )
    if not steps:
        return 0.0
    try:
        from opacus.accountants import PRVAccountant, RDPAccountant
    except ImportError as error:
        raise ConfigError(
            f"dp.noise-multiplier={noise_multiplier}: must be 0 without {MISSING}"
        ) from error
    book = RDPAccountant() if accountant == "rdp" else PRVAccountant()
    book.history = [(noise_multiplier, sample_rate, steps)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the best order is at an end of the list: still a bound
        return float(book.get_epsilon(delta=delta))


MISSING = "opacus (pip install 'fedsplit[dp]')"
