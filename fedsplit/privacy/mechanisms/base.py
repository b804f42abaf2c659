"""What every privacy mechanism is: a frozen set of parameters and one noisy map of vectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsplit.errors import PrivacyError
from fedsplit.privacy.secret import SecretStream


@dataclass(frozen=True)
class Mechanism(ABC):
    """Base of all mechanisms.

    A mechanism is immutable and holds no randomness: the stream brings it, so the same stream gives
    the same output.  ``describe()`` is part of the noise's identity: two mechanisms that differ in
    any parameter must describe themselves differently.
    """

    name: ClassVar[str]

    def describe(self) -> dict[str, Any]:
        """Return the mechanism's name and parameters, JSON-able, for ledgers and noise identity."""
        return {"mechanism": self.name, **asdict(self)}

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

    def privatise_sample(
        self, hidden: Tensor, token_ids: Tensor, stream: SecretStream, scale: Tensor | None = None
    ) -> Tensor:
        """Return what may leave for one sample whose tokens are ``token_ids``, ``(T,)``.

        What an owner calls.  Mechanisms on vectors leave ``token_ids`` alone; those on text do not
        read ``hidden``.
        """
        return self.privatise(hidden, stream, scale)

    @abstractmethod
    def guarantee(self, views: int = 1) -> str:
        """Say in words what the recipient can and cannot learn after ``views`` fresh draws."""

    def log_likelihood(self, squared: Tensor) -> Tensor:
        """Return log p(received | candidate) up to a constant, from squared L2 distances.

        What a server that denoises, or an attacker, may compute; may overwrite ``squared``.  The
        distances are between vectors times :meth:`whitener`, where there is one.

        Raises:
            PrivacyError: if the mechanism's law is not a function of that distance.
        """
        raise PrivacyError(f"mechanism={self.name!r}: must have noise whose law is known")

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
