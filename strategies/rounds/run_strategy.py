"""What every strategy of this project adds to Flower's: a run with settings, files and restarts."""

from __future__ import annotations

import logging
import resource
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Self

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

from fedsplit.config import RunConfig
from fedsplit.errors import PrivacyError
from fedsplit.privacy.secure_aggregation.numbers import Summed

from ..secure_aggregation.averaging import average_sum, check_mean
from ..secure_aggregation.masked_round import MaskedRound
from ..sessions.offers import Offers
from ..sessions.representation_cache import RepresentationCache
from ..settings import Settings, current_run, run_config
from .aggregate import average_owners
from .averaging import make_averaging, set_current_arrays
from .client_manager import ClientManager
from .polling_grid import PollingGrid
from .recorder import Recorder
from .round_context import ResumePoint, RoundContext
from .run_checkpoint import RunCheckpoint, SavedParts, open_states

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HandedOut:
    """Files that every owner gets.

    Attributes:
        kind: ``bottoms`` or ``emulators``.
        digest: of the files, by which owners verify them.
        files: contents by name.
    """

    kind: str
    digest: str
    files: Mapping[str, bytes]


class RunStrategy(Strategy):
    """A strategy of one run.

    Args:
        config: the run's settings.
        parts: what the strategy works with; closed with it.
        averaging: Flower strategy that averages what owners train (its ``aggregate_train``); None:
            as the settings say.
        cache: representations received, or None.

    Attributes:
        clients: the owners' names, and who is asked.
        checkpoint: what the run goes on from, and leaves for a later start.
        round: the round under way, or None between rounds.
        rounds_done: rounds that are over, those of an interrupted start included.
        masked: the masked sum of the round under way (``secure.aggregation``), or None.
    """

    NAME: ClassVar[str]  # row of strategies.STRATEGIES

    def __init__(
        self,
        config: RunConfig,
        parts: SavedParts,
        averaging: Strategy | None = None,
        cache: RepresentationCache | None = None,
    ) -> None:
        self.config = config
        self.averaging = averaging or make_averaging(config)
        if config.secure.aggregation:
            check_mean(self.averaging)
        self.recorder = parts.recorder
        self.watch = parts.watch
        self.clients = ClientManager(config, parts.watch)
        self.checkpoint = RunCheckpoint(config, parts, self.clients, self.averaging, cache)
        self.round: RoundContext | None = None
        self.rounds_done = 0
        self.masked: MaskedRound | None = None

    # ---- a run from its settings to its files ------------------------------------------------

    @classmethod
    @abstractmethod
    def build(
        cls,
        config: RunConfig,
        run_id: int,
        recorder: Recorder,
        folder: Path,
        averaging: Strategy | None,
    ) -> Self:
        """Return the strategy of a run, its model loaded and its session server open.

        Args:
            config: the run's settings.
            run_id: Flower's.
            recorder: writes down what happens.
            folder: ``output.dir``, or a temporary one.
            averaging: Flower strategy that averages; None: as the settings say.
        """

    @classmethod
    @contextmanager
    def open(
        cls,
        config: Settings = None,
        *,
        averaging: Strategy | None = None,
        run_id: int | None = None,
        **settings: Any,
    ) -> Iterator[Self]:
        """Yield a strategy that is ready to start; on leaving, what was trained is written.

        A run that was killed at any moment goes on from its last state in the same ``output.dir``.

        Args:
            config: what the settings begin with: a RunConfig, flat settings, or the ServerApp's
                context, whose run config and run id are used.
            averaging: Flower strategy or wrapper whose ``aggregate_train`` averages what owners
                train; None: as the settings say.
            run_id: Flower's id of the run; None: the context's, or this process's.
            settings: single settings or sections, see :func:`strategies.settings.run_config`.

        Raises:
            ConfigError, ModelError, LineageError, PrivacyError: settings or a model that cannot be
                used.
            RunError: ``output.dir`` holds an interrupted run of other settings, is in use by
                another run, or cannot be written.
        """
        run_id = current_run(config, run_id)
        config = run_config(config, cls.NAME, **settings)
        began = time.perf_counter()
        if config.output.threads:
            torch.set_num_threads(config.output.threads)
        with (
            Recorder.open(config, run_id) as recorder,
            open_states(config) as states,
            TemporaryDirectory() as scratch,
        ):
            folder = Path(config.output.dir or scratch)
            with closing(cls.build(config, run_id, recorder, folder, averaging)) as strategy:
                checkpoint = strategy.checkpoint
                checkpoint.open(states)
                strategy.rounds_done = checkpoint.first
                recorder.write(setup_s=time.perf_counter() - began, status="running")
                yield strategy
                checkpoint.take_best()
                strategy.write_results()
                recorder.write(
                    status="stopped" if strategy.rounds_left else "completed",
                    run_s=time.perf_counter() - began,
                    # kilobytes on Linux
                    peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                )
                if not strategy.rounds_left:
                    checkpoint.clear()

    @abstractmethod
    def write_results(self) -> None:
        """Write what was trained into ``output.dir``.

        Raises:
            RunError: it cannot be written.
        """

    @abstractmethod
    def close(self) -> None:
        """Close all sessions and the session server's port."""

    # ---- Flower's start ----------------------------------------------------------------------

    @property
    @abstractmethod
    def initial_arrays(self) -> ArrayRecord:
        """What owners train, as it is now: what a start begins with."""

    @property
    @abstractmethod
    def handed_out(self) -> HandedOut:
        """What sessions give to an owner that has no copy of it: a bottom, or an emulator."""

    @property
    def rounds_left(self) -> int:
        """Rounds that a start has to do."""
        return max(0, self.config.train.rounds - self.rounds_done)

    def polling(self, grid: Grid) -> PollingGrid:
        """Return the grid that a start sends through."""
        return PollingGrid(grid)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float | None = None,
        *args: Any,
        **options: Any,
    ) -> Result:
        """Run as Flower does, but learn of every reply when it comes.

        Args:
            grid: Flower's.
            initial_arrays: what owners begin with; None: :attr:`initial_arrays`.
            num_rounds: rounds to do; None: :attr:`rounds_left`.
            timeout: seconds that a round may take; None: ``session.round-s``.
            args: as of Flower's ``Strategy.start``.
            options: likewise.
        """
        arrays = self.initial_arrays if initial_arrays is None else initial_arrays
        rounds = self.rounds_left if num_rounds is None else num_rounds
        seconds = self.config.session.round_s if timeout is None else timeout
        return super().start(self.polling(grid), arrays, rounds, seconds, *args, **options)

    # ---- Flower's hooks ----------------------------------------------------------------------

    def average(
        self,
        context: RoundContext,
        lineage: dict[str, Any],
        replies: Sequence[Message],
        as_base: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict,
    ) -> ArrayRecord | None:
        """Return the average of what a round's owners trained, see :func:`average_owners`.

        Args:
            context: the round.
            lineage: its row, from ``watch.open_round``.
            replies: acceptable ones, with checked weights.
            as_base: what weights make of the base's own tensors.
        """
        names, robust = self.clients.names, self.config.robust
        start = self.checkpoint.arrays or self.initial_arrays
        return average_owners(
            self.watch, lineage, replies, names, self.averaging, start, robust, as_base
        )

    def open_masked(self, context: RoundContext, offers: Offers, grid: Grid, run: int) -> None:
        """Exchange keys and shares, where what a round's owners train is added up under masks.

        Args:
            context: the round; owners that fail are left out of it.
            offers: its offers, which will hand on the shares.
            grid: Flower's.
            run: Flower's id of the run.
        """
        self.masked = None
        if self.config.secure.aggregation and context.mode == MessageType.TRAIN and context.shapes:
            masked = MaskedRound(
                self.config, run, context, self.clients, lambda n: offers.content(n, 1), grid
            )
            masked.prepare()
            offers.extra = masked.records
            self.masked = masked

    def average_masked(
        self,
        lineage: dict[str, Any],
        replies: Sequence[Message],
        as_base: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict,
        check: Callable[[Summed], None] = lambda summed: None,
    ) -> tuple[ArrayRecord | None, Summed | None]:
        """Return (what owners go on from, what the sum says) after a masked round.

        Both are None where the sum cannot be had; the row then says why.

        Args:
            lineage: the round's row, from ``watch.open_round``.
            replies: those whose numbers are in the sum.
            as_base: what weights make of the base's own tensors.
            check: raises PrivacyError for a sum that must not be used.
        """
        assert self.masked is not None
        summed = None
        try:
            summed = self.masked.close()
            check(summed)
        except PrivacyError as error:
            log.warning("round %d: nothing averaged: %s", lineage["round"], error)
            lineage["note"] = str(error)
            return None, None
        start = self.checkpoint.arrays or self.initial_arrays
        watch, averaging = self.watch, self.averaging
        arrays = average_sum(watch, lineage, summed, replies[0], averaging, start, as_base)
        return arrays, summed

    def record_outcomes(
        self, context: RoundContext, worked: Iterable[str], lineage: dict[str, Any]
    ) -> None:
        """Count who failed, or sent what is held against it, and bench who goes on so."""
        charged = {**lineage.get("charged", {}), **context.report.cohort.charged}
        if charged:
            lineage["charged"] = charged
        fine = [name for name in worked if name not in charged]
        self.clients.record_outcomes(context.number, fine, context.report.cohort.lost, charged)

    def report_phase(
        self, context: RoundContext, metrics: dict[str, Any], lineage: dict[str, Any]
    ) -> MetricRecord:
        """Log the line that ends a round's training or evaluation; return its numbers."""
        rounds = self.config.train.rounds
        self.recorder.phase_ended(context.number, rounds, context.mode, metrics, lineage)
        return MetricRecord({k: v for k, v in metrics.items() if isinstance(v, int | float)})

    @abstractmethod
    def open_round(self, context: RoundContext, arrays: ArrayRecord, grid: Grid) -> list[Message]:
        """Return the messages that a round still has to send."""

    @abstractmethod
    def close_training(
        self, context: RoundContext, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord]:
        """Return (what owners train, averaged; metrics) of a round of training."""

    @abstractmethod
    def close_evaluation(
        self, context: RoundContext, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return the metrics of a round of evaluation."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Open the round and return one message per sampled owner."""
        set_current_arrays(self.averaging, arrays)
        self.checkpoint.arrays = arrays
        if self.checkpoint.trained and server_round == 1:
            return []  # the interrupted run did it, and was killed before its evaluation
        if self.checkpoint.stopping.stopped:
            return []  # Flower counts the rounds that are left to their end
        return self._open(server_round, MessageType.TRAIN, arrays, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average what owners trained, check its lineage, record the round and keep its state."""
        context, self.round = self.round, None
        self.rounds_done = self.checkpoint.first + server_round
        if context is None:
            return self.checkpoint.arrays, None
        arrays, metrics = self.close_training(context, replies)
        self.checkpoint.arrays = arrays or self.checkpoint.arrays
        self.checkpoint.save(context, "trained")
        return arrays, metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Open a round on the owners' held-out texts, when it is due."""
        every, number = self.config.output.evaluate_every, self.checkpoint.first + server_round
        if self.round is None and self.checkpoint.stopping.stopped:
            return []
        if not every or (number % every and number != self.config.train.rounds):
            return []
        return self._open(server_round, MessageType.EVALUATE, arrays, grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Average the owners' reports, record them and keep a state."""
        context, self.round = self.round, None
        if context is None:
            return None
        metrics = self.close_evaluation(context, replies)
        told = self.recorder.content["rounds"][-1]["evaluate"]["metrics"]["owners"]
        best = self.checkpoint.judge(context.number, metrics or {}, told)
        self.checkpoint.save(context, "evaluated", best=best)
        return metrics

    def waves(self, grid: Grid, nodes: list[int], resume: ResumePoint | None) -> list[list[int]]:
        """Return who of a round's nodes is asked together; all of them by default."""
        return [nodes]

    def _open(self, server_round: int, mode: str, arrays: ArrayRecord, grid: Grid) -> list[Message]:
        number = self.checkpoint.first + server_round
        shapes = {name: tuple(array.shape) for name, array in arrays.items()}
        began = time.perf_counter()
        nodes = self.clients.sample(grid, number)
        resume = self.checkpoint.take_resume_point()
        waves = self.waves(grid, nodes, resume)
        self.round = RoundContext(
            self.config, number, mode, nodes, self.clients.names, shapes, waves, resume, began=began
        )
        self.recorder.round_started(number, mode, len(self.round.expected))
        return self.open_round(self.round, arrays, grid)
