"""When a split-tuning run keeps its state, and where a round that was interrupted goes on."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from flwr.app import ArrayRecord
from torch import Tensor

from ..rounds.client_manager import Roll
from .cohort import Cohort, Place
from .round import Round
from .run_checkpoint import Begin, Resumed, SplitState, arrays_of, begin_facts, good_of


class Keeping:
    """A run's states, as far as the strategy has to know of them.

    Args:
        every: steps between states within a round; 0 = none there.
        cohort: knows who takes the next step.
        roll: the owners' names.

    Attributes:
        first: rounds that an interrupted run has finished.
        job: names the run across its restarts.
        begin: where the next round begins, if not at its start; :meth:`open` takes it.
        good: the top that a rejected round goes back to, or None.
        arrays: what owners train, as it was last averaged.
    """

    def __init__(self, every: int, cohort: Cohort, roll: Roll) -> None:
        self._every = every
        self._cohort = cohort
        self._roll = roll
        self._state: SplitState | None = None
        self._start = Resumed(secrets.token_hex(16))
        self._asked: list[int] = []  # whom the round has asked so far
        self._cohort_nodes: list[int] = []  # whom it asks in all
        self._out: frozenset[str] = frozenset()  # who was done with it before a restart
        self._steps = 0
        self.begin: Begin | None = None
        self.good: dict[str, Tensor] | None = None
        self.arrays: ArrayRecord | None = None

    @property
    def first(self) -> int:
        """Rounds that are over: Flower's ``start()`` counts those that are left."""
        return self._start.first

    @property
    def job(self) -> str:
        """Names the run across its restarts, each of which has a run id of its own."""
        return self._start.job

    @property
    def trained(self) -> bool:
        """Whether only the evaluation of round ``first + 1`` is missing."""
        return self._start.trained

    def resume(self, state: SplitState) -> None:
        """Go on where the state's folder says, and keep states there from now on.

        Raises:
            RunError: the folder holds a run of other settings, or no sound state.
        """
        self._state = state
        self._start = start = state.resume()
        self.begin, self.good, self.arrays = start.begin, start.good, start.arrays
        self._roll.recall(start.roll, start.cohort)

    def open(self, nodes: Iterable[int]) -> Begin | None:
        """Take note of a new round with these owners; return where it begins, if not at 0."""
        begin, self.begin = self.begin, None
        self._asked, self._cohort_nodes = [], list(nodes)
        self._out = begin.out if begin else frozenset()
        return begin

    def ask(self, nodes: Iterable[int]) -> None:
        """Take note that these owners' turn has come."""
        self._asked += nodes

    def keep(self, number: int, stage: str) -> None:
        """Keep a state after a round was ``trained``, or ``evaluated``.

        Raises:
            RunError: it cannot be written; the state before is intact.
        """
        if self._state is None:
            return
        facts = self._facts(number, stage)
        if stage == "evaluated":
            self._state.keep_same(facts)
        else:
            self._state.keep(facts, arrays_of(self.arrays))

    def step(self, current: Round, shapes: Mapping[str, Any]) -> None:
        """A step was taken: keep a state if one is due.

        Args:
            current: the round.
            shapes: of what owners train; has moved on their machines, so that such a round can only
                begin at its start again.
        """
        self._steps += 1
        due = self._every > 0 and self._steps % self._every == 0
        if self._state is None or not due or shapes or current.mode != "train":
            return
        cohort = self._cohort
        place = replace(cohort.place, wave=current.wave, waves=current.waves)
        going_on = {*cohort.live, *cohort.waiting}
        if not going_on:  # the wave is over
            place = Place(wave=current.wave + 1, waves=current.waves)
            if place.wave >= place.waves:
                return  # and with it the round, whose own state comes at once
        asked = {self._roll.names.get(n, "") for n in self._asked}
        out = sorted((asked | self._out) - going_on - {""})
        begin = begin_facts(place, cohort.live, out, current.report.cohort)
        tensors = {**arrays_of(self.arrays), "rng": torch.get_rng_state(), **good_of(self.good)}
        self._state.keep(self._facts(current.number, "step") | {"begin": begin}, tensors)

    def _facts(self, number: int, stage: str) -> dict[str, Any]:
        names = [n for i in self._cohort_nodes if (n := self._roll.names.get(i))]
        return {"round": number, "stage": stage, "roll": self._roll.memory(), "cohort": names}


def first_step(current: Round | None, name: str | None) -> int:
    """Return the step that an owner begins a round with."""
    begin = current.begin if current is not None else None
    return begin.first_of(name) if begin is not None else 0
