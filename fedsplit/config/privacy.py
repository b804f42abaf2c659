"""The group ``privacy``: what the run asks owners to do to what they send."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedsplit.errors import check, one_of

DENOISE = ("off", "ends", "uniform", "unigram", "contextual", "linear", "learned")


@dataclass(frozen=True)
class PrivacyConfig:
    """The mechanism owners are asked to use on what they send.

    Attributes:
        mechanism: row of :data:`fedsplit.privacy.MECHANISMS`; checked when settings are read
            (:mod:`fedsplit.settings`), as is its level.
        eta: of ``dchi`` (1/length units of the bottom's output) and ``nearest-token`` (1/length
            units of the word embeddings); 0 = use ``noise_ratio``.
        noise_ratio: E||n|| / median ||h||, or E||n|| / C where rows are clipped, which carries
            over between models; 0 = use the mechanism's own level (``eta``, ``epsilon`` or
            ``budget``).
        row_clip: C, the L2 norm that rows are clipped to before any mechanism's noise: ``off``;
            ``auto`` (a high quantile of the norms over public inputs, which each side finds for
            itself in the bottom that came); or a number (length units of what the noise is put
            on).  An owner's policy may demand it and bound it.
        epsilon: of ``gaussian`` (nats per token); 0 = use ``noise_ratio``.
        delta: of ``gaussian``.
        clip: of ``gaussian``: bound on a token's vector (length units of the bottom's output);
            0 = the largest norm over public inputs.
        budget: of ``pac``: mutual information (nats per token); 0 = use ``noise_ratio``.
        covariance: of ``pac``: whose vectors shape the noise.  ``public`` inputs, known to all; or
            each owner's ``own``, which then only that owner knows (nobody can denoise).
        subsamples: of ``pac``: parts of those vectors; along each direction the largest variance
            of any part counts.
        spare: of ``shaped``: standard deviation along the spared directions over that along all
            others, in (0, 1]; ``noise_ratio`` is that of noise as strong as the spared everywhere.
        task_words: of ``shaped``: groups of public words with ``|`` between groups, such as
            ``good fine | bad awful``; what tells the groups apart is spared.
        cti: whose noise is reduced: ``off``, ``tfidf``, ``purity`` (these two read
            the private labels), ``public-idf`` or ``frequent`` (these two do not): rows of
            :mod:`fedsplit.privacy.contributing_tokens`.
        cti_per_class: tokens selected per class at most.
        cti_max_share: largest share of running tokens that may be touched.
        cti_rho: noise multiplier of the selected tokens; 0 sends them in the clear.
        denoise: what the server does with received vectors before its top reads them: ``off``;
            ``ends`` (clean vectors for the special tokens that every text has); ``uniform``,
            ``unigram`` or ``contextual`` (the same, and posterior means over the public vocabulary
            with that prior), all for embeddings-only frozen bottoms; ``linear`` (the best affine
            map) or ``learned`` (a small network), both taught on public text, for any frozen
            bottom.  Post-processing: costs no privacy.
        public_text: the server's own public text for priors and teaching: files with one text per
            line, or folders of such ``.txt`` files, separated as in PATH; empty: the interpreter's
            docstrings.  Owners never read it.
    """

    mechanism: str = "none"
    eta: float = 0.0
    noise_ratio: float = 0.0
    row_clip: str = "off"
    epsilon: float = 0.0
    delta: float = 1e-5
    clip: float = 0.0
    budget: float = 0.0
    covariance: str = "public"
    subsamples: int = 8
    spare: float = 0.3
    task_words: str = ""
    cti: str = "off"
    cti_per_class: int = 16
    cti_max_share: float = 0.01
    cti_rho: float = 0.3
    denoise: str = "off"
    public_text: str = ""

    def __post_init__(self) -> None:
        _level("eta", self.eta, "1/length units of the representation")
        _level("epsilon", self.epsilon, "nats per token")
        _level("budget", self.budget, "nats per token")
        check(
            self.noise_ratio >= 0 and math.isfinite(self.noise_ratio),
            "privacy.noise-ratio",
            self.noise_ratio,
            "> 0, or 0 to use the mechanism's own level",
        )
        check(
            self.row_clip in ("off", "auto") or _positive(self.row_clip),
            "privacy.row-clip",
            self.row_clip,
            "off, auto or a number > 0 (length units of the representation)",
        )
        check(0 < self.delta < 1, "privacy.delta", self.delta, "in (0, 1) (probability)")
        check(
            self.clip >= 0 and math.isfinite(self.clip),
            "privacy.clip",
            self.clip,
            "> 0 (length units of the representation), or 0 for that of public inputs",
        )
        one_of("privacy.covariance", self.covariance, ("public", "own"))
        check(1 <= self.subsamples <= 64, "privacy.subsamples", self.subsamples, "in [1, 64]")
        check(0 < self.spare <= 1, "privacy.spare", self.spare, "in (0, 1]")
        check(self.cti_per_class >= 1, "privacy.cti-per-class", self.cti_per_class, ">= 1")
        check(0 < self.cti_max_share <= 1, "privacy.cti-max-share", self.cti_max_share, "in (0, 1]")
        check(0 <= self.cti_rho <= 1, "privacy.cti-rho", self.cti_rho, "in [0, 1]")
        one_of("privacy.denoise", self.denoise, DENOISE)


def _positive(text: str) -> bool:
    """Return whether a text is a positive number."""
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


def _level(name: str, value: float, unit: str) -> None:
    """Refuse a noise level that is no positive number, or 0 for none."""
    good = value >= 0 and math.isfinite(value)
    check(good, f"privacy.{name}", value, f"> 0 ({unit}), or 0 to use privacy.noise-ratio")
