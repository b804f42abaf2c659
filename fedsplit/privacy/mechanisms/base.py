"""Base class of all privacy mechanisms: a frozen set of parameters and one noisy map of vectors."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from fedsplit.config import PrivacyConfig
from fedsplit.errors import PrivacyError, check
from fedsplit.privacy.levels import Level
from fedsplit.privacy.mechanisms.calibration import (
    CalibrationInputs,
    Norms,
    norms_of,
    public_vectors,
)
from fedsplit.privacy.secret import SecretStream


@dataclass(frozen=True)
class Mechanism(ABC):
    """Base of all mechanisms.

    A mechanism is immutable and holds no randomness: the stream brings it, so the same stream gives
    the same output.  ``describe()`` is part of the noise's identity: two mechanisms that differ in
    any parameter must describe themselves differently.

    Everything that other parts of the project need to know of a mechanism stands here: settings,
    policy, ledger, reports, attacks and denoisers ask it and name none.

    Attributes:
        row_clip: C: rows are clipped to that L2 norm before anything else is done to them (length
            units of what the noise is put on); 0 = they are not.
        name: row of :data:`fedsplit.privacy.mechanisms.table.MECHANISMS`.
        title: how reports name it.
        level: the parameter that says how weak the noise is; None for a mechanism without noise.
        adds_noise: whether what leaves is a representation plus noise; otherwise what leaves are
            clean vectors, of the text itself or of another text.
        replaces_tokens: whether what leaves are clean vectors of other tokens.
        token_by_token: whether a text may be sent in pieces, as cached decoding does.
        needs_frozen_bottom: whether a bottom that learns is refused.
    """

    name: ClassVar[str]
    title: ClassVar[str] = ""
    level: ClassVar[Level | None] = None
    adds_noise: ClassVar[bool] = True
    replaces_tokens: ClassVar[bool] = False
    token_by_token: ClassVar[bool] = True
    needs_frozen_bottom: ClassVar[bool] = False
    row_clip: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        ok = isinstance(self.row_clip, int | float) and 0 <= self.row_clip < math.inf
        check(ok, "row_clip", self.row_clip, ">= 0 (length units), 0 for no clipping")
        object.__setattr__(self, "row_clip", float(self.row_clip))

    # ---- from a run's settings --------------------------------------------------------------

    @classmethod
    def protects(cls) -> bool:
        """Return whether anything is done to what leaves."""
        return cls.adds_noise or cls.replaces_tokens

    @classmethod
    def check_settings(cls, config: PrivacyConfig) -> None:
        """Refuse settings from which this mechanism cannot be built.

        Raises:
            ConfigError: names the setting, its value and what it must be.
        """
        if cls.level is None:
            return
        value = getattr(config, cls.level.setting)
        check(
            (value > 0) != (config.noise_ratio > 0),
            f"privacy.{cls.level.key}",
            value,
            f"> 0 when privacy.noise-ratio ({config.noise_ratio}) is 0, and 0 otherwise",
        )

    @classmethod
    @abstractmethod
    def from_settings(cls, inputs: CalibrationInputs) -> Self:
        """Return the mechanism that ``inputs.config`` asks for.

        Raises:
            ConfigError: a parameter out of range.
            PrivacyError: an owner asked for a calibration on its own text and gave none.
        """

    @classmethod
    def level_at(cls, ratio: float, inputs: CalibrationInputs) -> float:
        """Return the level at which the noise ratio is ``ratio``, rounded to 4 digits.

        Raises:
            ConfigError: ``ratio`` is out of range.
            PrivacyError: this mechanism has no level.
        """
        raise PrivacyError(f"mechanism={cls.name!r}: must have a level to set a noise ratio")

    @classmethod
    def level_from(cls, inputs: CalibrationInputs) -> float:
        """Return the configured level, through the noise ratio where that is what is set."""
        assert cls.level is not None, cls.name
        own = float(getattr(inputs.config, cls.level.setting))
        return own or cls.level_at(inputs.config.noise_ratio, inputs)

    @classmethod
    def public_norms(cls, inputs: CalibrationInputs) -> Norms:
        """Return the norms of the vectors that the noise is put on, over public inputs, and C."""
        return inputs.norms

    @classmethod
    def needs_own_text(cls, config: PrivacyConfig) -> bool:
        """Return whether an owner builds this mechanism from its own training text."""
        return False

    @classmethod
    def public_settings(cls, config: PrivacyConfig) -> dict[str, float]:
        """Return the settings that say how strong this mechanism is, for a run's live status."""
        names = [cls.level.setting, "noise_ratio"] if cls.level is not None else []
        return {n.replace("_", "-"): getattr(config, n) for n in names if getattr(config, n)}

    @classmethod
    def label(cls, settings: Mapping[str, Any]) -> str:
        """Return how a report names this mechanism at the settings of the group ``privacy``.

        Args:
            settings: names as in :class:`PrivacyConfig`, such as ``noise_ratio``.
        """
        title = cls.title or cls.name
        if cls.level is not None and (own := settings.get(cls.level.setting)):
            return f"{title}, {cls.level.setting} {own:g}"
        ratio = settings.get("noise_ratio")
        return f"{title}, ratio {ratio:g}" if cls.level is not None and ratio else title

    # ---- what leaves ------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """Return the mechanism's name and parameters, JSON-able, for ledgers and noise identity."""
        return {"mechanism": self.name, **self._parameters(), **self._clipped()}

    def _parameters(self) -> dict[str, Any]:
        """Return what :meth:`describe` says beside the name and C."""
        return {key: value for key, value in asdict(self).items() if key != "row_clip"}

    def _clipped(self) -> dict[str, float]:
        return {"row_clip": self.row_clip} if self.row_clip else {}

    @abstractmethod
    def privatise(
        self, hidden: Tensor, stream: SecretStream, scale: Tensor | None = None
    ) -> Tensor:
        """Return what may leave for one sample.

        Gradients with respect to ``hidden`` pass through additive noise unchanged.

        Args:
            hidden: representations of one sample's tokens, floating point, ``(T, d)``.
            stream: the owner's stream for exactly this sample and mechanism.
            scale: per-token noise multiplier in [0, 1], ``(T,)``; 0 leaves a token in the clear.

        Returns:
            ``(T, d)``, same dtype and device as ``hidden``.

        Raises:
            PrivacyError: for NaN or infinite values, or shapes for which the guarantee fails.
        """

    def covered(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
        """Return the rows that the noise hides, ``(T, d')``, clipped; they identify the noise.

        Mechanisms on vectors hide ``hidden`` and leave ``token_ids`` ``(T,)`` alone; those on text
        hide the words' vectors and do not read ``hidden``.
        """
        return clip_rows(hidden, self.row_clip)

    def privatise_sample(
        self, hidden: Tensor, token_ids: Tensor, stream: SecretStream, scale: Tensor | None = None
    ) -> Tensor:
        """Return what may leave for one sample whose tokens are ``token_ids``, ``(T,)``.

        What an owner calls: :meth:`privatise` on the rows that are :meth:`covered`.
        """
        return self.privatise(self.covered(hidden, token_ids), stream, scale)

    @property
    def sent_norm(self) -> float:
        """Return the L2 norm that rows are clipped to before noise; 0 = they are not.

        What a received row is compared with (denoisers, attacks) has to be clipped to it as well.
        """
        return self.row_clip

    # ---- what it promises, and how it is measured -------------------------------------------

    @abstractmethod
    def guarantee(self, views: int = 1) -> str:
        """Say in words what the recipient can and cannot learn after ``views`` fresh draws."""

    @classmethod
    def cost_of(cls, description: Mapping[str, Any]) -> tuple[str, float]:
        """Return unit and amount that one draw costs; unit ``none`` for no guarantee.

        Args:
            description: what :meth:`describe` returned when the draw was made.
        """
        value = None if cls.level is None else description.get(cls.level.setting)
        if cls.level is None or not cls.level.total or not isinstance(value, int | float):
            return "none", 0.0
        return cls.level.total, float(value)

    def mean_noise_norm(self, width: int) -> float | None:
        """Return E||n|| per token in ``width`` dimensions; None where it cannot be told.

        The unit is that of the vectors that the noise is put on.  A mechanism that returns None
        satisfies no policy that bounds the noise ratio.
        """
        return None if self.protects() else 0.0

    def covered_norms(self, bottom: nn.Module, vocabulary: int) -> Norms:
        """Return the norms of the vectors that the noise covers, over public inputs."""
        return norms_of(public_vectors(bottom, vocabulary))

    def noise_ratio(self, bottom: nn.Module, vocabulary: int) -> float | None:
        """Return E||n|| / C, or E||n|| / median ||h|| without clipping; None: cannot be told.

        A level alone says nothing: the length of the representation is the choice of whoever made
        the bottom.  Without clipping, the median is over public inputs and says nothing of any one
        row; with it, no row whatever is longer than C.
        """
        norms = self.covered_norms(bottom, vocabulary)
        length = self.mean_noise_norm(norms.dim)
        if length is None:
            return None
        reference = self.row_clip or norms.median
        return math.inf if reference == 0 else length / reference

    def distance(self, asked: float) -> float:
        """Return the largest distance of two covered rows that are ``asked`` apart before."""
        check_distance(asked)
        return min(asked, 2 * self.row_clip) if self.row_clip else asked

    def clipping(self) -> str:
        """Say in words what clipping adds to the guarantee; empty without it."""
        if not self.row_clip:
            return ""
        return f"; rows are clipped to {self.row_clip:g}: no two are more than twice that apart"

    def log_likelihood(self, squared: Tensor) -> Tensor:
        """Return log p(received | candidate) up to a constant, from squared L2 distances.

        What a server that denoises, or an attacker, may compute; may overwrite ``squared``.  The
        distances are between vectors times :meth:`whitener`, where there is one.

        Raises:
            PrivacyError: if the mechanism's likelihood is not a function of that distance.
        """
        raise PrivacyError(f"mechanism={self.name!r}: must have a known noise distribution")

    def replaced(self, token_ids: Tensor, stream: SecretStream) -> Tensor:
        """Return the ids (T,) that are sent for ``token_ids`` (T,), where tokens are replaced.

        Raises:
            PrivacyError: this mechanism replaces no tokens.
        """
        raise PrivacyError(f"mechanism={self.name!r}: must replace tokens")

    def replacing_vectors(self) -> tuple[Tensor, Tensor]:
        """Return the public vectors of true and of sent tokens, ``(V, d)`` both.

        The noise is put on the first; the token whose second is nearest is sent.

        Raises:
            PrivacyError: this mechanism replaces no tokens.
        """
        raise PrivacyError(f"mechanism={self.name!r}: must replace tokens")

    def whitener(self) -> Tensor | None:
        """Return a public, invertible ``(d, d)`` after which the noise is isotropic, or None."""
        return None

    @abstractmethod
    def per_token_epsilon(self, distance: float, views: int = 1) -> float:
        """Return the bound on the log-likelihood ratio (nats) for two representations.

        For a mechanism with a delta, the bound holds except with that probability mass; infinite
        where the mechanism has no such bound.

        Args:
            distance: L2 distance of the two representations of one token, representation units.
            views: fresh draws of noise that were sent for the same token.
        """


def clip_rows(rows: Tensor, bound: float) -> Tensor:
    """Return ``rows`` (..., T, d), each shortened to the L2 norm ``bound`` if it is longer.

    Rows within the bound keep their bits.  The others have it up to the rounding of their dtype.

    Args:
        rows: floating point.
        bound: C; 0 = leave all as they are.
    """
    if not bound or rows.dim() < 2:
        return rows
    norms = rows.double().norm(dim=-1, keepdim=True)  # (..., T, 1)
    shorter = (rows.double() * (bound / norms)).to(rows.dtype)
    return torch.where(norms > bound, shorter, rows)


def check_views(views: int) -> None:
    """Raise ``PrivacyError`` unless ``views`` is a positive count."""
    if views < 1:
        raise PrivacyError(f"views={views!r}: must be >= 1 (fresh draws sent per sample)")


def check_distance(distance: float) -> None:
    """Raise ``PrivacyError`` unless ``distance`` is a length."""
    if not distance >= 0:
        raise PrivacyError(f"distance={distance!r}: must be >= 0 (representation units)")


def check_hidden(hidden: Tensor, scale: Tensor | None) -> None:
    """Refuse input on which no mechanism's guarantee would hold.

    Raises:
        PrivacyError: if ``hidden`` is not a finite floating ``(T, d)`` tensor with d >= 1, or
            ``scale`` is not ``(T,)`` within [0, 1].
    """
    if hidden.dim() != 2 or hidden.shape[1] < 1:
        raise PrivacyError(f"hidden.shape={tuple(hidden.shape)}: must be (tokens, d >= 1)")
    if not hidden.is_floating_point():
        raise PrivacyError(f"hidden.dtype={hidden.dtype}: must be a floating-point type")
    if not bool(torch.isfinite(hidden).all()):
        bad = int((~torch.isfinite(hidden)).sum())
        raise PrivacyError(f"hidden: {bad} NaN or infinite values: must be 0")
    if scale is None:
        return
    if scale.shape != hidden.shape[:1]:
        raise PrivacyError(f"scale.shape={tuple(scale.shape)}: must be ({hidden.shape[0]},)")
    if not bool(((scale >= 0) & (scale <= 1)).all()):  # NaN fails too
        raise PrivacyError(
            f"scale in [{float(scale.min())!r}, {float(scale.max())!r}]: must be within [0, 1]"
        )


def add_noise(hidden: Tensor, noise: Tensor, scale: Tensor | None) -> Tensor:
    """Return ``hidden + scale * noise`` summed in float64, rounded once to ``hidden.dtype``.

    Args:
        hidden: ``(T, d)``.
        noise: float64, ``(T, d)``.
        scale: ``(T,)`` or None for 1.

    Raises:
        PrivacyError: if the sum overflows ``hidden.dtype``.
    """
    noise = noise.to(hidden.device)
    if scale is not None:
        noise = noise * scale.to(noise).unsqueeze(1)  # (T, d) * (T, 1)
    out = (hidden.to(torch.float64) + noise).to(hidden.dtype)
    if not bool(torch.isfinite(out).all()):
        raise PrivacyError(
            f"noise norm={float(noise.norm(dim=1).max()):.4g}: must fit {hidden.dtype} (overflow)"
        )
    return out
