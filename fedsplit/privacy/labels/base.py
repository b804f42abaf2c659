"""What every protection of labels is: parameters, and two maps, of labels and of gradients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsplit.errors import PrivacyError
from fedsplit.privacy.secret import SecretStream


@dataclass(frozen=True)
class LabelProtection(ABC):
    """Base of all protections of labels; by itself it changes nothing.

    Like a mechanism it holds no randomness: the stream brings it, so the same stream gives the same
    output.
    """

    name: ClassVar[str]

    def describe(self) -> dict[str, Any]:
        """Return the name and the parameters, JSON-able; part of the noise's identity."""
        return {"protection": self.name, **asdict(self)}

    @abstractmethod
    def guarantee(self) -> str:
        """Say in words what the recipient can and cannot learn about labels."""

    def relabel(self, label: int, classes: int, stream: SecretStream) -> int:
        """Return the label that training uses instead of ``label``, in [0, classes)."""
        return label

    def transition(self, classes: int) -> Tensor | None:
        """Return the public law of :meth:`relabel`, (C, C) float64: row = true label; or None."""
        return None

    def perturb(self, rows: Tensor, labels: Tensor, share: float, stream: SecretStream) -> Tensor:
        """Return what may leave instead of one batch's gradients.

        Args:
            rows: (N, d), one gradient per sample, floating point.
            labels: (N,), the classes they belong to.
            share: of class 1 among all of the owner's samples (two-class methods).
            stream: the owner's, for exactly these gradients.

        Returns:
            (N, d), same dtype.

        Raises:
            PrivacyError: for other shapes, or NaN or infinite values.
        """
        return rows

    @property
    def perturbs(self) -> bool:
        """Whether :meth:`perturb` does anything."""
        return type(self).perturb is not LabelProtection.perturb


@dataclass(frozen=True)
class Unprotected(LabelProtection):
    """Nothing is done.

    With the head at the server every label can be read off its gradient's one negative entry; with
    the head at the owner the gradient's direction still tells two classes apart
    (:mod:`fedsplit.attacks.labels.leakage`).
    """

    name: ClassVar[str] = "none"

    def guarantee(self) -> str:
        """See :meth:`LabelProtection.guarantee`."""
        return "no guarantee for labels: gradients show them"


def check_gradients(rows: Tensor, labels: Tensor) -> None:
    """Refuse input on which a protection would not do what it says.

    Raises:
        PrivacyError: unless ``rows`` is a finite floating (N, d) and ``labels`` (N,).
    """
    if rows.dim() != 2 or labels.shape != rows.shape[:1] or not rows.is_floating_point():
        raise PrivacyError(
            f"gradients {tuple(rows.shape)} of labels {tuple(labels.shape)}: must be a floating "
            "(N, d) and (N,)"
        )
    if not bool(torch.isfinite(rows).all()):
        raise PrivacyError("gradients: must hold no NaN or infinite value")
