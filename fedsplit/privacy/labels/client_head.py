"""The head at the owner (U-shape): labels and logits do not cross."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedsplit.config import LabelsConfig, RunConfig
from fedsplit.errors import check
from fedsplit.privacy.labels.base import LabelProtection
from fedsplit.tasks import Task


@dataclass(frozen=True)
class ClientHead(LabelProtection):
    """The owner holds and trains the head; hidden states come down, their gradients go up.

    It changes neither labels nor gradients, so it goes with any protection that does.

    Guarantee:
        None by itself: labels and logits do not cross.
    What breaks it:
        The direction of a hidden state's gradient still tells two classes apart
        (:mod:`fedsplit.attacks.labels.leakage`).
    """

    name: ClassVar[str] = "client-head"
    owner_head: ClassVar[bool] = True
    takes_tokens: ClassVar[bool] = True

    @classmethod
    def fits(cls, task: type[Task]) -> bool:
        """Return True: where the head is changes nothing of what labels are."""
        return True

    @classmethod
    def from_settings(cls, config: LabelsConfig) -> ClientHead:
        return cls()

    @classmethod
    def check_settings(cls, config: RunConfig) -> None:
        """See :meth:`LabelProtection.check_settings`; the server must have something to train."""
        super().check_settings(config)
        check(
            config.train.method != "head",
            "labels.protection",
            config.labels.protection,
            "used with a train.method that leaves the server something to train, not 'head'",
        )

    def guarantee(self) -> str:
        return "labels and logits do not cross; gradients of hidden states may tell classes apart"
