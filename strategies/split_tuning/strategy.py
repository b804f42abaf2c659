"""SplitTuning: the strategy that holds the top model (SAP, arXiv 2312.15603).

Per round, each sampled owner gets one train message that announces a session.  Inside it the owner
sends privatised representations, the server answers with logits, the owner returns the gradient of
its private-label loss, and the top learns from all connected owners at once.  ``Strategy.start()``
is Flower's own, over a :class:`~strategies.rounds.polling_grid.PollingGrid`; sessions open in
``configure_*`` and close in ``aggregate_*``, so Flower's wrappers (differential privacy on joint
bottoms, for one) compose.  Under a wrapper, replies are read at the end of the round, as in Flower.
"""

from __future__ import annotations

import logging
import resource
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
)
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy
from torch import Tensor

from fedsplit.config import RunConfig
from fedsplit.errors import LineageError, ModelError, RunError
from fedsplit.wire.replies import reply_schema

from ..rounds.averaging import set_current_arrays
from ..rounds.client_manager import ClientManager
from ..rounds.lineage_setup import average_watched
from ..rounds.lineage_watch import stop_reason
from ..rounds.polling_grid import PollingGrid
from ..rounds.recorder import Recorder
from ..rounds.replies import (
    Accepted,
    average,
    check_weights,
    collect,
    read_reply,
)
from ..rounds.report import RoundReport
from ..rounds.run_strategy import RunStrategy
from ..sessions.representation_cache import RepresentationCache
from ..settings import Settings, current_run, run_config
from .cohort import Cohort
from .parts import ServerParts, build_parts
from .round_context import RoundContext
from .round_sessions import RoundSessions
from .run_checkpoint import FOLDER, Resumed, RunCheckpoint, earlier_content, open_checkpoint
from .trained_weights import FILE, identity, save_trained

log = logging.getLogger(__name__)


class SplitTuning(RunStrategy):
    """Trains the top with owners that keep the bottom, their text and their labels.

    Args:
        config: the run's settings.
        parts: top, optimizer, sessions and records.
        averaging: Flower strategy that averages what owners train, joint bottoms and heads (its
            ``aggregate_train``).

    :meth:`resume` takes an interrupted run up.
    """

    def __init__(
        self, config: RunConfig, parts: ServerParts, averaging: Strategy | None = None
    ) -> None:
        super().__init__(config)
        self.parts = parts
        self.store = RepresentationCache()
        self.averaging = averaging or FedAvg(weighted_by_key="targets")
        self._joint = config.split.bottom == "joint"
        self._clients = ClientManager(config, parts.watch)
        self._checkpoint: RunCheckpoint | None = None
        self._resumed = Resumed(secrets.token_hex(16))
        self._good: dict[str, Tensor] | None = None  # the top that a rejected round goes back to
        self._arrays: ArrayRecord | None = None  # what owners train, as it was last averaged
        self.patience_s = config.session.idle_s  # for a reply, once the session is over
        self._cohort = Cohort(
            parts.model.top,
            parts.optimisation,
            joint=self._joint,
            per_token=config.model.task == "causal-lm",
            positions=parts.model.positions,
            window=config.session.window,
            on_step=self._on_step,
            denoise=parts.model.denoise,
        )
        self._sessions = RoundSessions(config, parts, self._cohort, self._clients, self.store)

    def resume(self, checkpoint: RunCheckpoint) -> None:
        """Go on where the checkpoint's folder says, and keep states there from now on.

        Raises:
            RunError: the folder holds a run of other settings, or no sound state.
        """
        self._checkpoint = checkpoint
        self._resumed = resumed = checkpoint.resume()
        self._good, self._arrays = resumed.good, resumed.arrays
        self._clients.recall(resumed.clients, resumed.cohort)
        self.rounds_done = resumed.first

    @property
    def clients(self) -> ClientManager:
        """Who takes part."""
        return self._clients

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

        ::

            with SplitTuning.open(context, model="gpt2", task="causal-lm", k=2) as strategy:
                strategy.start(grid)

        The run's folder (``output_dir=...``) gets ``server.json``, the states that a run killed at
        any moment goes on from, and at the end ``top.safetensors``, which serving loads.

        Args:
            config: what the settings begin with: a RunConfig, flat settings, or the ServerApp's
                context, whose run config and run id are used.
            averaging: Flower strategy or wrapper that averages what owners train (joint bottoms,
                heads of their own) in its ``aggregate_train``; None: FedAvg.
            run_id: Flower's id of the run; None: the context's, or this process's.
            settings: see :func:`strategies.settings.run_config`.

        Raises:
            ConfigError, ModelError, LineageError, PrivacyError: settings or a model that cannot be
                used.
            RunError: ``output.dir`` holds an interrupted run of other settings, is in use by
                another run, or cannot be written.
        """
        run_id = current_run(config, run_id)
        config = run_config(config, "split-tuning", **settings)
        began = time.perf_counter()
        if config.output.threads:
            torch.set_num_threads(config.output.threads)
        with Recorder.open(config, run_id) as recorder:
            if config.output.dir and (Path(config.output.dir) / FOLDER).exists():
                recorder.content |= earlier_content(Path(config.output.dir))
            with closing(build_parts(config, run_id, recorder)) as parts:
                strategy = cls(config, parts, averaging)
                checkpoint = open_checkpoint(
                    config, parts, strategy.store, strategy.averaging, strategy.clients
                )
                try:
                    if checkpoint is not None:
                        strategy.resume(checkpoint)
                    recorder.write(setup_s=time.perf_counter() - began, status="running")
                    yield strategy
                    strategy.finish(began)
                    if checkpoint is not None and not strategy.rounds_left:
                        checkpoint.folder.clear()  # there is nothing left to go on with
                finally:
                    if checkpoint is not None:
                        checkpoint.folder.close()

    @property
    def initial_arrays(self) -> ArrayRecord:
        """What owners train, as it is now: what a start begins with."""
        return self._arrays or self.parts.initial

    def finish(self, began: float) -> None:
        """Write what was trained, and that the run is completed.

        Raises:
            RunError: it cannot be written.
        """
        output, recorder = self.config.output, self.parts.recorder
        if output.dir and output.save:
            belongs = identity(self.config, self.parts.model.base_digest)
            trained = self.parts.model.trainable.state()
            save_trained(Path(output.dir) / FILE, trained, self._arrays, belongs)
        if output.transcript:
            recorder.transcript(self.store)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux
        status = "stopped" if self.rounds_left else "completed"
        recorder.write(status=status, run_s=time.perf_counter() - began, peak_rss_bytes=peak)

    # ---- Flower's hooks ---------------------------------------------------------------------

    def polling(self, grid: Grid) -> PollingGrid:
        """Return a grid that tells the round of every reply."""
        sessions = self._sessions
        return PollingGrid(
            grid,
            heard=sessions.on_reply,
            waits_for=sessions.waits_for,
            patience_s=self.patience_s,
        )

    def summary(self) -> None:
        """Log what is about to happen."""
        c = self.config
        log.info(
            "split tuning of %s at k=%d (%s bottom), %s over %s, %.1f %% of the top trained",
            c.model.name, c.split.k, c.split.bottom, c.session.schedule, c.session.transport,
            100 * self.parts.model.trainable.share,
        )  # fmt: skip

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Open the round's sessions and return one message per sampled owner."""
        number = server_round + self._resumed.first
        set_current_arrays(self.averaging, arrays)
        self._arrays = arrays
        if self._resumed.trained and server_round == 1:
            return []  # the interrupted run did it, and was killed before its evaluation
        if self._resumed.resume is None:  # else it is what the interrupted run began the round with
            reject = self.config.lineage.gate == "reject"
            self._good = self.parts.model.trainable.state() if reject else None
        return self._open(grid, number, MessageType.TRAIN, arrays)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Close the sessions, average what owners trained, check the lineage, record the round."""
        if (context := self._sessions.close(replies)) is None:
            return self._arrays, None
        number, report, names = context.number, context.report, self._clients.names
        good, metrics = self._accept(context)
        lineage = self.parts.watch.begin(number)
        arrays = None
        if shapes := context.shapes:
            good = [m for m in good if self._weights_ok(m, shapes, report)]
            arrays = average_watched(self.parts.watch, lineage, number, good, names, self.averaging)
        worked = [names[m.metadata.src_node_id] for m in good]
        self._clients.settle(number, worked, report.cohort.lost)
        self._check_lineage(lineage)
        row = {"round": number, "train": self._row(context, metrics), "lineage": lineage}
        self.parts.recorder.round(row)
        self._tell(context, metrics, lineage)
        if not report.cohort.steps:
            lost = "; ".join(f"{name}: {why}" for name, why in report.cohort.lost.items())
            raise RunError(f"round {number}: no owner took a step: {lost[:2000]}")
        if reason := stop_reason(lineage):
            raise LineageError(f"round {number}: {reason}")
        if lineage.get("rejected"):
            arrays = None  # the bottoms go back with the top: Flower keeps the last ones
        self._arrays = arrays or self._arrays
        self.rounds_done = number
        if self._checkpoint is not None:
            self._checkpoint.keep_round(context, self._arrays)
        record = MetricRecord({k: v for k, v in metrics.items() if isinstance(v, (int, float))})
        for key in ("pcs", "ics", "score"):
            if isinstance(lineage.get(key), float):
                record[f"lineage-{key}"] = lineage[key]
        record["lineage-ok"] = int(lineage.get("verdict") in ("in_lineage", "off"))
        return arrays, record

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Open evaluation sessions on the owners' held-out samples, when they are due."""
        every = self.config.output.evaluate_every
        number = server_round + self._resumed.first
        last = number == self.config.train.rounds
        if not every or (number % every and not last):
            return []
        return self._open(grid, number, MessageType.EVALUATE, arrays)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Average the owners' reports, weighted by their number of samples."""
        if (context := self._sessions.close(replies)) is None:
            return None
        _, metrics = self._accept(context)
        self.parts.recorder.round(
            {"round": context.number, "evaluate": self._row(context, metrics)}
        )
        self._tell(context, metrics, {})
        if self._checkpoint is not None:
            self._checkpoint.keep_round(context, self._arrays)
        return MetricRecord({k: v for k, v in metrics.items() if isinstance(v, (int, float))})

    # ---- closing ----------------------------------------------------------------------------

    def _open(self, grid: Grid, number: int, mode: str, arrays: ArrayRecord) -> list[Message]:
        resume, self._resumed.resume = self._resumed.resume, None
        job = self._checkpoint.job if self._checkpoint is not None else self._resumed.job
        return self._sessions.open(grid, number, mode, arrays, resume=resume, job=job)

    def _accept(self, context: RoundContext) -> tuple[list[Message], dict[str, Any]]:
        """Return (acceptable replies, their weighted averages)."""
        report, names = context.report, self._clients.names
        schema = reply_schema("split-tuning", report.mode)

        def accept(node: int, reply: Message) -> Accepted | None:
            metrics, name = read_reply(schema, reply.content, names.get(node), report)
            finished = name in report.finished and names.get(node) == name
            return (name, metrics) if finished else None

        good, rows = collect(context.replies, self._sessions.offers, names, report, accept)
        return good, average(rows)

    def _row(self, context: RoundContext, metrics: dict[str, Any]) -> dict[str, Any]:
        benched, report = self._clients.sitting(context.number), context.report
        denoise = self.parts.model.denoise
        return {
            **report.to_dict(),
            "asked": len(context.sampled),
            "partial": bool(report.cohort.lost or benched),
            "benched": benched,
            "metrics": metrics,
            "wall_s": time.perf_counter() - context.began,
            "messages": context.messages,
            "denoising": denoise.report() if denoise else None,
        }

    def _weights_ok(
        self, message: Message, shapes: dict[str, tuple[int, ...]], report: RoundReport
    ) -> bool:
        """Refuse NaN and foreign tensors from one owner; the others' work is kept."""
        name = self._clients.names[message.metadata.src_node_id]
        try:
            check_weights(message.content, shapes)
        except ModelError as error:
            report.cohort.lost[name] = f"update refused: {error}"
            log.warning("owner %s: update refused: %s", name, error)
            return False
        return True

    def _check_lineage(self, row: dict[str, Any]) -> None:
        """Check what the server trained; on a rejected round go back to the last good top."""
        watch = self.parts.watch
        changed = [name for name, _ in self.parts.model.trainable.named_parameters()]
        watch.check_model(row, self.parts.model.top.model, changed)
        watch.close(row)
        if row.get("rejected") and self._good is not None:
            self.parts.model.trainable.load(self._good)

    # ---- telling ----------------------------------------------------------------------------

    def _on_step(self, step: int, steps: int) -> None:
        context = self._sessions.context
        if context is None:
            return
        if self._checkpoint is not None:
            self._checkpoint.keep_step(context, self._cohort, self._arrays, self._good)
        waves = context.report.waves
        self.parts.recorder.progress(
            round=context.number,
            rounds=self.config.train.rounds,
            mode=context.mode,
            step=step,
            steps=steps,
            owners=len(waves[-1]) if waves else 0,
            lost=len(context.report.cohort.lost),
        )

    def _tell(
        self, context: RoundContext, metrics: dict[str, Any], lineage: dict[str, Any]
    ) -> None:
        rounds = self.config.train.rounds
        self.parts.recorder.phase(context.number, rounds, context.mode, metrics, lineage)
