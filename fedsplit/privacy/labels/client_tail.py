"""The last blocks and the head at the owner, which returns no gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedsplit.config import LabelsConfig, RunConfig
from fedsplit.errors import check
from fedsplit.privacy.labels.base import LabelProtection, check_gradients
from fedsplit.privacy.secret import SecretStream
from fedsplit.tasks import Task


@dataclass(frozen=True)
class ClientTail(LabelProtection):
    """The owner holds and trains the last blocks and the head; the server's blocks stay frozen.

    Hidden states come down, the number of targets goes up and nothing else: what the server runs
    learns nothing, so that it needs no gradient.

    Guarantee:
        Everything that the server receives during a session is a function of the texts that the
        mechanism sent and of their lengths.  Of the labels it is exactly as likely under any
        labels, against any attacker and over any number of passes.  With ``labels.tail-weights =
        "own"`` that holds for the whole run.
    What breaks it:
        The representations: a language model's labels are its text, which they show unless the
        mechanism hides it.  Averaged tails (``tail-weights = "averaged"``): an owner's weights
        after a round tell of its labels, the rows of a trained vocabulary projection which tokens
        occur; DP-SGD (the group ``dp``) bounds that.  Exact averages of the loss.

    Args:
        blocks: last blocks at the owner.
    """

    name: ClassVar[str] = "client-tail"
    owner_head: ClassVar[bool] = True
    withholds: ClassVar[bool] = True
    takes_tokens: ClassVar[bool] = True
    blocks: int

    def __post_init__(self) -> None:
        check(self.blocks >= 1, "blocks", self.blocks, ">= 1 (last blocks at the owner)")

    @classmethod
    def fits(cls, task: type[Task]) -> bool:
        """Return True: nothing of any label leaves."""
        return True

    @classmethod
    def from_settings(cls, config: LabelsConfig) -> ClientTail:
        return cls(config.tail_blocks)

    @classmethod
    def check_settings(cls, config: RunConfig) -> None:
        """See :meth:`LabelProtection.check_settings`; nothing may wait for a gradient."""
        super().check_settings(config)
        method, bottom = config.train.method, config.split.bottom
        check(
            method == "head",
            "train.method",
            method,
            "'head' with labels.protection=client-tail: the server gets no gradient to train on",
        )
        check(
            bottom == "frozen",
            "split.bottom",
            bottom,
            "'frozen' with labels.protection=client-tail: no gradient comes back to the bottom",
        )

    def guarantee(self) -> str:
        return (
            f"no gradient leaves: the last {self.blocks} block(s) and the head are trained by the "
            "owner, and sessions tell nothing of labels beyond what the representations show"
        )

    def perturb(self, rows: Tensor, labels: Tensor, share: float, stream: SecretStream) -> Tensor:
        """Return zeros: nothing of the gradients may leave."""
        check_gradients(rows, labels)
        return torch.zeros_like(rows)
