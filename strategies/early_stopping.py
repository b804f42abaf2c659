"""Early stopping by the owners' held-out loss, and the best state of a run.

A loss is an owner's word, and a mean of losses is anyone's who names a large enough one.  So from
``FEWEST`` owners on that have told theirs both times, a state is better where owners with more than
half of the weight say so: who lies needs half of it, whatever numbers it names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

from torch import Tensor

from .rounds.contributions import FEWEST

Losses: TypeAlias = Mapping[str, tuple[float, float]]
"""Owner -> (its held-out loss, its weight)."""


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
        self._owners: dict[str, float] = {}  # of the best state
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

    def improves(self, number: int, loss: float, owners: Losses = MappingProxyType({})) -> bool:
        """Return whether the loss after round ``number`` is the lowest yet; one not finite is not.

        An equal loss does not count: what came first is kept.

        Args:
            number: of the round.
            loss: the owners' mean one; decides where fewer than ``FEWEST`` told theirs both times.
            owners: each one's.
        """
        both = {name: told for name, told in owners.items() if name in self._owners}
        if len(both) >= FEWEST:
            lower = sum(w for name, (own, w) in both.items() if own < self._owners[name])
            better = 2 * lower > sum(weight for _, weight in both.values())
        else:
            better = loss < self._loss
        if better:
            self._round, self._loss, self._waited = number, loss, 0
            self._owners = {name: own for name, (own, _) in owners.items()}
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
        return {**self.report(), "facts": self.facts, "owners": self._owners}

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state`."""
        loss = state["best_loss"]
        self._round, self._waited = int(state["best_round"]), int(state["waited"])
        self._loss = math.inf if loss is None else float(loss)
        self._owners = {str(name): float(own) for name, own in state.get("owners", {}).items()}
        self.keep(tensors, state["facts"])
