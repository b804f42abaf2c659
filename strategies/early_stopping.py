"""Early stopping by the owners' held-out loss, and the best state of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor


class EarlyStopping:
    """Watches the held-out loss of each evaluation and keeps what was best.

    Args:
        patience: evaluations without a lower loss after which the run ends; 0 = never, and nothing
            is kept.

    Attributes:
        tensors: of the best state, by name; empty: nothing was evaluated yet.
        facts: of the best state, JSON-able.
    """

    def __init__(self, patience: int) -> None:
        self._patience = patience
        self._round = 0
        self._loss = math.inf
        self._waited = 0
        self.tensors: dict[str, Tensor] = {}
        self.facts: dict[str, Any] = {}

    @property
    def active(self) -> bool:
        """Whether losses are watched."""
        return self._patience > 0

    @property
    def stopped(self) -> bool:
        """Whether the run is to end."""
        return self.active and self._waited >= self._patience

    def improves(self, number: int, loss: float) -> bool:
        """Return whether the loss after round ``number`` is the lowest yet; one not finite is not.

        An equal loss does not count: what came first is kept.
        """
        if loss < self._loss:
            self._round, self._loss, self._waited = number, loss, 0
            return True
        self._waited += 1
        return False

    def keep(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Keep copies of a state as the best one: an optimizer's own moments go on moving."""
        self.tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self.facts = dict(facts)

    def report(self) -> dict[str, Any]:
        """Return what to tell of it, JSON-able."""
        return {
            "best_round": self._round,
            "best_loss": None if math.isinf(self._loss) else self._loss,
            "waited": self._waited,
            "stopped": self.stopped,
        }

    def state(self) -> dict[str, Any]:
        """Return what a restart needs beside :attr:`tensors`, JSON-able."""
        return {**self.report(), "facts": self.facts}

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state`."""
        loss = state["best_loss"]
        self._round, self._waited = int(state["best_round"]), int(state["waited"])
        self._loss = math.inf if loss is None else float(loss)
        self.keep(tensors, state["facts"])
