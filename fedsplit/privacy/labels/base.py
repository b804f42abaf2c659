"""Base class of all protections of labels: parameters, and maps of labels and of gradients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from fedsplit.config import LabelsConfig, RunConfig
from fedsplit.errors import PrivacyError, check
from fedsplit.privacy.levels import Level
from fedsplit.privacy.secret import SecretStream
from fedsplit.tasks import TASKS, Task, task_type


@dataclass(frozen=True)
class LabelProtection(ABC):
    """Base of all protections of labels; by itself it changes nothing.

    Like a mechanism it holds no randomness: the stream brings it, so the same stream gives the same
    output.  Settings, policy, ledger and reports ask it and name none.

    Attributes:
        name: row of :data:`fedsplit.privacy.labels.table.LABEL_PROTECTIONS`.
        level: the parameter that says how strong it is; None where there is none.
        owner_head: whether the owner must hold the head.
        withholds: whether no gradient leaves at all; what the server runs then stays frozen.
        takes_tokens: whether :meth:`perturb` also works on one row per token, as the gradients of
            a language model are; otherwise it takes one row per sample.
    """

    name: ClassVar[str]
    level: ClassVar[Level | None] = None
    owner_head: ClassVar[bool] = False
    withholds: ClassVar[bool] = False
    takes_tokens: ClassVar[bool] = False

    @classmethod
    def fits(cls, task: type[Task]) -> bool:
        """Return whether it protects a task's labels; by itself, those of one class per text."""
        return task.exclusive and not task.per_token

    @classmethod
    @abstractmethod
    def from_settings(cls, config: LabelsConfig) -> Self:
        """Return the protection that the settings ask for.

        Raises:
            ConfigError: a parameter out of range.
        """

    @classmethod
    def check_settings(cls, config: RunConfig) -> None:
        """Refuse a run that this protection does not fit.

        Raises:
            ConfigError: names the setting, its value and what it must be.
        """
        fitting = " or ".join(name for name, task in sorted(TASKS.items()) if cls.fits(task))
        check(
            cls.fits(task_type(config.model.task)),
            "labels.protection",
            config.labels.protection,
            f"used with model.task={fitting}, not {config.model.task}",
        )

    @classmethod
    def changes_labels(cls) -> bool:
        """Return whether :meth:`relabel` does anything."""
        return cls.relabel is not LabelProtection.relabel

    @classmethod
    def changes_gradients(cls) -> bool:
        """Return whether :meth:`perturb` does anything."""
        return cls.perturb is not LabelProtection.perturb

    @classmethod
    def label(cls, config: LabelsConfig) -> str:
        """Return how a report names its strength, such as ``epsilon=1``; empty for no level."""
        if cls.level is None:
            return ""
        return f"{cls.level.key}={getattr(config, cls.level.setting):g}"

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
        """Return the public distribution of :meth:`relabel`, or None.

        Returns:
            (C, C) float64, row = true label, column = drawn label.
        """
        return None

    def row_law(self, width: int) -> tuple[str, float, float] | None:
        """Return the public law of the noise on rows (N, width) of each target's own loss.

        Returns:
            (``gaussian`` or ``dchi``, its scale as in
            :class:`fedsplit.attacks.gradients.token_recovery.GradientNoise`, the norm that rows
            are clipped to before); None: rows are left alone, or their law is not of that kind.
        """
        return None

    def perturb(self, rows: Tensor, labels: Tensor, share: float, stream: SecretStream) -> Tensor:
        """Return what may leave instead of one batch's gradients.

        Args:
            rows: (N, d), one gradient per sample, floating point.
            labels: (N, ...), what they belong to: classes, or what else the task has.
            share: of class 1 among all of the owner's samples (two-class methods).
            stream: the owner's, for exactly these gradients.

        Returns:
            (N, d), same dtype.

        Raises:
            PrivacyError: for other shapes, or NaN or infinite values.
        """
        return rows


@dataclass(frozen=True)
class Unprotected(LabelProtection):
    """No protection.

    With the head at the server every label can be read off its gradient's one negative entry; with
    the head at the owner the gradient's direction still tells two classes apart
    (:mod:`fedsplit.attacks.labels.leakage`).
    """

    name: ClassVar[str] = "none"
    takes_tokens: ClassVar[bool] = True

    @classmethod
    def fits(cls, task: type[Task]) -> bool:
        """Return True: it does nothing to the labels of any task."""
        return True

    @classmethod
    def from_settings(cls, config: LabelsConfig) -> Unprotected:
        return cls()

    def guarantee(self) -> str:
        return "no guarantee for labels: gradients show them"


def check_gradients(rows: Tensor, labels: Tensor) -> None:
    """Refuse input on which a protection would not do what it says.

    Raises:
        PrivacyError: unless ``rows`` is a finite floating (N, d) and ``labels`` (N, ...).
    """
    if rows.dim() != 2 or labels.shape[:1] != rows.shape[:1] or not rows.is_floating_point():
        raise PrivacyError(
            f"gradients {tuple(rows.shape)} of labels {tuple(labels.shape)}: must be a floating "
            "(N, d) and (N, ...)"
        )
    if not bool(torch.isfinite(rows).all()):
        raise PrivacyError("gradients: must hold no NaN or infinite value")
