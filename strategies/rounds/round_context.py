"""The state of one round: who takes part, how far it is, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from flwr.app import Message, Metadata
from torch import Tensor

from fedsplit.config import RunConfig

from .report import CohortReport, RoundReport


@dataclass(frozen=True)
class Position:
    """How far a round is: so many steps of this group of this wave have been taken.

    Attributes:
        wave: index of the wave.
        waves: of the round.
        group: index of the owners that step together.
        groups: of the wave (one where the schedule is parallel).
        step: steps taken.
        steps: of the group.
    """

    wave: int = 0
    waves: int = 1
    group: int = 0
    groups: int = 1
    step: int = 0
    steps: int = 0


@dataclass(frozen=True)
class ResumePoint:
    """Where an interrupted round is taken up.

    Attributes:
        position: of the next step.
        live: the owners that the step is taken with.
        out: owners that have finished the round, or were lost in it.
        report: what the round had come to.
        rng: state of torch's CPU generator.
    """

    position: Position
    live: tuple[str, ...]
    out: frozenset[str]
    report: CohortReport
    rng: Tensor

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any], rng: Tensor) -> ResumePoint:
        """Return the point that :meth:`to_facts` describes."""
        return cls(
            Position(**facts["place"]),
            tuple(facts["live"]),
            frozenset(facts["out"]),
            CohortReport(**facts["report"]),
            rng,
        )

    def to_facts(self) -> dict[str, Any]:
        """Return everything but the generator's state, JSON-able."""
        return {
            "place": asdict(self.position),
            "live": list(self.live),
            "out": sorted(self.out),
            "report": vars(self.report),
        }


@dataclass
class RoundContext:
    """One round under way.

    Attributes:
        config: the run's settings.
        number: of the round, from 1.
        mode: ``train`` or ``evaluate``; also the type of its Flower messages.
        nodes: everyone sampled.
        names: node -> owner, as far as known.
        shapes: of what owners train, by name.
        waves: who is asked together, without those that were done before a restart.
        resume: where an interrupted round is taken up, or None.
        position: how far it is.
        live: owners that take the next step.
        waiting: owners whose turn comes later in this wave.
        asked: nodes that have been sent their offer.
        sent: metadata of the messages that were sent; Flower's grid gives them their ids.
        replies: those that came before the last wave was sent.
        messages: Flower messages of the round, replies included.
        report: what came of it.
        began: ``time.perf_counter()`` at its start.
    """

    config: RunConfig
    number: int
    mode: str
    nodes: list[int]
    names: Mapping[int, str]
    shapes: Mapping[str, tuple[int, ...]]
    waves: list[list[int]]
    resume: ResumePoint | None = None
    position: Position = field(default_factory=Position)
    live: Sequence[str] = ()
    waiting: Sequence[str] = ()
    asked: set[int] = field(default_factory=set)
    sent: list[Metadata] = field(default_factory=list)
    replies: list[Message] = field(default_factory=list)
    messages: int = 0
    report: RoundReport = field(init=False)
    began: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.report = RoundReport(self.mode)
        point = self.resume
        if point is None:
            count = max(1, -(-len(self.expected) // self.wave_size))
            self.position = Position(waves=count)
        else:
            self.position = Position(wave=point.position.wave, waves=point.position.waves)
            self.report.cohort = replace(point.report, lost=dict(point.report.lost))

    @property
    def expected(self) -> list[int]:
        """The nodes that the round asks, in the order of their waves."""
        return [node for wave in self.waves for node in wave]

    @property
    def wave_size(self) -> int:
        """Owners that step together at most."""
        return self.config.session.wave or max(1, len(self.expected))

    def first_step(self, owner: str | None) -> int:
        """Return the step that an owner's session begins with; an interrupted one took others."""
        point = self.resume
        return point.position.step if point is not None and owner in point.live else 0

    def resumed_here(self) -> Position | None:
        """Return how far an interrupted run had come in this very wave, or None."""
        wave = min(self.position.wave, self.position.waves - 1)
        point = self.resume
        return point.position if point is not None and point.position.wave == wave else None

    def progress(self, done: float) -> float:
        """Return the share of the run that is over when ``done`` of the group's steps are."""
        at = self.position
        part = (at.group + done) / at.groups
        part = (min(at.wave, at.waves - 1) + part) / at.waves
        return (self.number - 1 + part) / self.config.train.rounds

    def resume_point(self, rng: Tensor) -> ResumePoint | None:
        """Return where the round could be taken up from here; None where it has just ended.

        Args:
            rng: state of torch's CPU generator.
        """
        going_on = {*self.live, *self.waiting}
        at = self.position
        if not going_on:  # the wave is over
            at = Position(wave=at.wave + 1, waves=at.waves)
            if at.wave >= at.waves:
                return None
        done = self.resume.out if self.resume is not None else frozenset()
        asked = {self.names.get(node, "") for node in self.asked}
        out = (asked | done) - going_on - {""}
        report = replace(self.report.cohort, lost=dict(self.report.cohort.lost))
        return ResumePoint(at, tuple(self.live), frozenset(out), report, rng)

    def owners(self) -> list[str]:
        """Return the names of everyone sampled, as far as known."""
        return [name for node in self.nodes if (name := self.names.get(node))]
