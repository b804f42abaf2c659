"""Early stopping by the owners' held-out loss or score, and the best state of a run.

A value is an owner's word, and a mean of values is anyone's who names a large enough one.  So from
``FEWEST`` owners on that have told theirs both times, a state is better where owners with more than
half of the weight say so: who lies needs half of it, whatever numbers it names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

from flwr.app import MessageType
from torch import Tensor

from fedsplit.config import RunConfig
from fedsplit.tasks import task_of

from .rounds.contributions import FEWEST

Told: TypeAlias = Mapping[str, tuple[float, float]]
"""Owner -> (its held-out loss or score, its weight)."""


def watched_score(config: RunConfig, mode: str) -> Callable[[Mapping[str, float]], float | None]:
    """Return what makes an owner's main score of its report, where a run watches that."""
    if config.train.watch == "metric" and mode == MessageType.EVALUATE:
        return task_of(config).headline_of
    return lambda report: None


class EarlyStopping:
    """Watches the held-out loss, or a score, of each evaluation and keeps what was best.

    Args:
        patience: evaluations without a better value after which the run ends; 0 = never, and
            nothing is kept.
        watch: ``loss`` or ``metric``, see :class:`fedsplit.config.groups.TrainConfig`; reports
            name the best value by it.
        higher: whether a higher value is better.

    Attributes:
        tensors: of the best state, by name; empty: nothing was evaluated yet.
        facts: of the best state, JSON-able.
    """

    def __init__(self, patience: int, watch: str = "loss", *, higher: bool = False) -> None:
        self._patience = patience
        self._name = f"best_{watch}"
        self._sign = -1.0 if higher else 1.0  # a lower product is better
        self._round = 0
        self._best = self._sign * math.inf
        self._waited = 0
        self._owners: dict[str, float] = {}  # of the best state
        self.tensors: dict[str, Tensor] = {}
        self.facts: dict[str, Any] = {}

    @property
    def active(self) -> bool:
        """Whether anything is watched."""
        return self._patience > 0

    @property
    def stopped(self) -> bool:
        """Whether the run is to end."""
        return self.active and self._waited >= self._patience

    def improves(self, number: int, value: float, owners: Told = MappingProxyType({})) -> bool:
        """Return whether the value after round ``number`` is the best yet; NaN is not.

        An equal value does not count: what came first is kept.

        Args:
            number: of the round.
            value: of all owners; decides where fewer than ``FEWEST`` told theirs both times.
            owners: each one's.
        """
        both = {name: told for name, told in owners.items() if name in self._owners}
        if len(both) >= FEWEST:
            won = sum(w for name, (own, w) in both.items() if self._above(own, self._owners[name]))
            better = 2 * won > sum(weight for _, weight in both.values())
        else:
            better = self._above(value, self._best)
        if better:
            self._round, self._best, self._waited = number, value, 0
            self._owners = {name: own for name, (own, _) in owners.items()}
            return True
        self._waited += 1
        return False

    def _above(self, value: float, best: float) -> bool:
        """Return whether a value is better than another."""
        return self._sign * value < self._sign * best

    def keep(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Keep copies of a state as the best one: an optimizer's own moments go on moving."""
        self.tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self.facts = dict(facts)

    def report(self) -> dict[str, Any]:
        """Return what to tell of it, JSON-able."""
        return {
            "best_round": self._round,
            self._name: None if math.isinf(self._best) else self._best,
            "waited": self._waited,
            "stopped": self.stopped,
        }

    def state(self) -> dict[str, Any]:
        """Return what a restart needs beside :attr:`tensors`, JSON-able."""
        return {**self.report(), "facts": self.facts, "owners": self._owners}

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state`."""
        best = state[self._name]
        self._round, self._waited = int(state["best_round"]), int(state["waited"])
        self._best = self._sign * math.inf if best is None else float(best)
        self._owners = {str(name): float(own) for name, own in state.get("owners", {}).items()}
        self.keep(tensors, state["facts"])
