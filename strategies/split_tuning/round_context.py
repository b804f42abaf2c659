"""One round of split tuning: who takes part, where it resumed, and how far it is."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

from flwr.app import ArrayRecord, Message
from torch import Tensor

from fedsplit.config import RunConfig
from fedsplit.seeding import derive_seed

from ..rounds.report import CohortReport, RoundReport


@dataclass(frozen=True)
class Position:
    """Where a round is: so many steps of this group of this wave have been taken.

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
    """Where a resumed round goes on.

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


@dataclass
class RoundContext:
    """One round, from its offers to its report.

    Attributes:
        config: the run's settings.
        number: server round, from 1.
        mode: ``train`` or ``evaluate``.
        sampled: every node of the round, those that a resumed round is done with included.
        waves: nodes that are asked together, in the order of their owners' names.
        arrays: what owners train, as the round begins with it; often empty.
        resume: where an interrupted run had come to in this round, or None.
        asked: nodes that have been sent their offer.
        wave: index of the wave that is stepped.
        report: what came of it.
        replies: replies that have come.
        messages: Flower messages sent and received.
        began: when it was opened (``time.perf_counter``).
    """

    config: RunConfig
    number: int
    mode: str
    sampled: tuple[int, ...]
    waves: list[list[int]]
    arrays: ArrayRecord
    resume: ResumePoint | None = None
    asked: list[int] = field(default_factory=list)
    wave: int = 0
    report: RoundReport = field(init=False)
    replies: list[Message] = field(default_factory=list)
    messages: int = 0
    began: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.report = RoundReport(self.mode)
        if self.resume is not None:
            self.wave = self.resume.position.wave
            kept = self.resume.report
            self.report.cohort = replace(kept, lost=dict(kept.lost))

    @property
    def nodes(self) -> list[int]:
        """The nodes that are asked in this round."""
        return [node for wave in self.waves for node in wave]

    @property
    def wave_size(self) -> int:
        """Owners stepped together at most."""
        return self.config.session.wave or len(self.nodes)

    @property
    def wave_count(self) -> int:
        """Waves of the round, those before an interruption included."""
        if self.resume is not None:
            return self.resume.position.waves
        return max(1, -(-len(self.nodes) // max(1, self.wave_size)))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what owners train."""
        return {name: tuple(array.shape) for name, array in self.arrays.items()}

    @property
    def lifetime_s(self) -> float:
        """Seconds that a token is good for: every owner that connects gives the rest more time."""
        return self.config.session.wave_wait_s * (1 + max(map(len, self.waves), default=0))

    @property
    def seed(self) -> int:
        """Seed of the round's dropout."""
        return derive_seed(self.config.seed, "dropout", self.mode, self.number)

    def progress(self, part: float) -> float:
        """Return the share of the run that is done when ``part`` of this round is."""
        return (self.number - 1 + part) / self.config.train.rounds

    def first_step(self, owner: str | None) -> int:
        """Return the step of its own that an owner begins the round with."""
        if self.resume is None or owner not in self.resume.live:
            return 0
        return self.resume.position.step
