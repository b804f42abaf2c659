"""The group ``privacy``: what the run asks owners to do to what they send."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedsplit.config.bounds import one_of
from fedsplit.errors import check


@dataclass(frozen=True)
class PrivacyConfig:
    """The mechanism owners are asked to use on what they send.

    Attributes:
        mechanism: a row of ``fedsplit.privacy.MECHANISMS``.
        eta: d_chi parameter (1/length units of the bottom's output); 0 = use ``noise_ratio``.
        noise_ratio: E||n|| / median ||h||, which carries over between models; 0 = use ``eta``.
        cti: a row of ``fedsplit.privacy.cti.STATISTICS``, or ``off``.
        cti_per_class: tokens selected per class at most.
        cti_max_share: largest share of running tokens that may be touched.
        cti_rho: noise multiplier of the selected tokens; 0 sends them in the clear.
        denoise: what the server does with received vectors before its top reads them: ``off``,
            ``uniform`` or ``unigram`` (posterior mean over the public vocabulary with that prior;
            embeddings-only frozen bottoms).  Post-processing: costs no privacy.
    """

    mechanism: str = "none"
    eta: float = 0.0
    noise_ratio: float = 0.0
    cti: str = "off"
    cti_per_class: int = 16
    cti_max_share: float = 0.01
    cti_rho: float = 0.3
    denoise: str = "off"

    def __post_init__(self) -> None:
        check(
            self.eta >= 0 and math.isfinite(self.eta),
            "privacy.eta",
            self.eta,
            "> 0 (1/length units of the representation), or 0 to use privacy.noise-ratio",
        )
        check(
            self.noise_ratio >= 0 and math.isfinite(self.noise_ratio),
            "privacy.noise-ratio",
            self.noise_ratio,
            "> 0, or 0 to use privacy.eta",
        )
        if self.mechanism == "dchi":
            check(
                (self.eta > 0) != (self.noise_ratio > 0),
                "privacy.eta",
                self.eta,
                f"> 0 when privacy.noise-ratio ({self.noise_ratio}) is 0, and 0 otherwise",
            )
        check(self.cti_per_class >= 1, "privacy.cti-per-class", self.cti_per_class, ">= 1")
        check(0 < self.cti_max_share <= 1, "privacy.cti-max-share", self.cti_max_share, "in (0, 1]")
        check(0 <= self.cti_rho <= 1, "privacy.cti-rho", self.cti_rho, "in [0, 1]")
        one_of("privacy.denoise", self.denoise, ("off", "uniform", "unigram"))
