"""OffsiteTuning: owners tune adapters against an emulator, the server plugs them into the model.

Offsite-Tuning (arXiv 2302.04870) and ScaleOT (arXiv 2412.09812): M = [A, E], owners get [A, E*].
Per round each sampled owner gets the averaged adapters in a Flower message and returns its own; the
emulator crosses once, by digest, over a session.  The full model never leaves the server.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from flwr.app import ArrayRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedsplit.config import RunConfig
from fedsplit.errors import ConfigError, LineageError, RunError, WireError
from fedsplit.privacy.dp.accounting import spent_epsilon
from fedsplit.privacy.secure_aggregation.numbers import Summed, report_of
from fedsplit.wire.replies import reply_schema

from ..early_stopping import watched_score
from ..rounds.aggregate import tensors
from ..rounds.averaging import restore, state_of
from ..rounds.lineage_watch import stop_reason
from ..rounds.polling_grid import PollingGrid
from ..rounds.recorder import Recorder
from ..rounds.replies import Accepted, average, check_weights, collect, node_of, read_reply
from ..rounds.report import natural
from ..rounds.round_context import RoundContext
from ..rounds.run_strategy import HandedOut, RunStrategy
from ..sessions.offers import Offers
from .export import export
from .flights import BufferedGrid, Flight, Flights
from .parts import OffsiteParts, build_parts
from .quality import QualityCheck

log = logging.getLogger(__name__)


class OffsiteTuning(RunStrategy):
    """Averages the owners' adapters and plugs them into the full model.

    :meth:`open` with plain settings; the run's folder (``output_dir=...``) gets ``server.json``,
    ``emulator/`` and ``importance/`` (see :mod:`strategies.offsite_tuning.emulator`), states to go
    on from, ``adapters.safetensors`` after every round, and at the end ``adapter/`` and ``model/``
    (see :mod:`strategies.offsite_tuning.export`)::

        with OffsiteTuning.open(context, model="gpt2", compressor="scaleot") as strategy:
            strategy.start(grid)

    Args:
        config: the run's settings.
        parts: model, emulator, sessions and records.
        averaging: Flower strategy that averages adapters; None: as ``offsite.averaging`` says.
    """

    NAME = "offsite-tuning"

    def __init__(
        self, config: RunConfig, parts: OffsiteParts, averaging: Strategy | None = None
    ) -> None:
        super().__init__(config, parts, averaging)
        self.parts = parts
        self._grid: BufferedGrid | None = None
        base = float(parts.recorder.content["full_zero_shot_loss"])
        self.quality = QualityCheck(config.lineage, base, parts.public_loss)

    @classmethod
    def build(
        cls,
        config: RunConfig,
        run_id: int,
        recorder: Recorder,
        folder: Path,
        averaging: Strategy | None,
    ) -> Self:
        """Return the strategy of a run, its model loaded and its session server open."""
        if config.model.task != "causal-lm" or config.session.transport != "stream":
            raise ConfigError(
                f"model.task={config.model.task!r}, session.transport="
                f"{config.session.transport!r}: must be causal-lm and stream for offsite tuning"
            )
        return cls(config, build_parts(config, run_id, recorder, folder), averaging)

    def close(self) -> None:
        """Close all sessions and the session server's port."""
        self.parts.close()

    @property
    def initial_arrays(self) -> ArrayRecord:
        """The adapters as they are now: what a start begins with."""
        return self.parts.adapters()

    @property
    def handed_out(self) -> HandedOut:
        """The emulator."""
        return HandedOut("emulators", self.parts.digest, self.parts.files.files)

    def write_results(self) -> None:
        """Export the adapters and the plugged-in model, as the settings say.

        Raises:
            RunError: they cannot be written.
        """
        if self.config.output.dir and self.config.output.save:
            parts = self.parts
            self.recorder.content["exported"] = export(parts.folder, parts.loaded, parts.tuning)

    def summary(self) -> None:
        """Log what is about to happen."""
        o = self.config.offsite
        log.info(
            "offsite tuning of %s: %s, A = blocks %s, %s with %d trained parameters, %s",
            self.config.model.name,
            o.compressor,
            list(self.parts.emulator.plan.adapters),
            o.method,
            self.parts.tuning.count(),
            o.averaging,
        )

    def open_round(self, context: RoundContext, arrays: ArrayRecord, grid: Grid) -> list[Message]:
        """Return one message per sampled owner, with the averaged adapters and an offer."""
        stream = self.parts.stream
        offers = Offers(
            context, stream.authenticator, stream, digest=self.parts.digest, weights=arrays
        )
        self.open_masked(context, offers, grid, stream.authenticator.run)
        if self.parts.flights is not None:
            return self._launch(self.parts.flights, context, arrays, grid, offers)
        return offers.messages(context.expected)

    def _launch(
        self,
        flights: Flights,
        context: RoundContext,
        arrays: ArrayRecord,
        grid: Grid,
        offers: Offers,
    ) -> list[Message]:
        """Ask whoever is not at work; after a restart also those that were, for what they did."""
        self.clients.ask_names(grid, context.expected)
        names, stream = self.clients.names, self.parts.stream
        messages: list[Message] = []
        training = context.mode == MessageType.TRAIN
        for flight in flights.relaunch(names) if training else ():
            then = replace(context, number=flight.number)
            began = flights.version(flight.number)
            again = Offers(
                then, stream.authenticator, stream, digest=self.parts.digest, weights=began
            )
            messages.append(again.message(flight.node))
        idle = [n for n in context.expected if n in names and names[n] not in flights.owners]
        context.waves = [idle] if idle else []
        if training:
            for node in idle:
                flights.launch(node, names[node], context.number, arrays)
            flights.due = True
        return [*messages, *offers.messages(idle)]

    def polling(self, grid: Grid) -> PollingGrid:
        """Return the grid that a start sends through."""
        flights = self.parts.flights
        if flights is None:
            return super().polling(grid)
        self._grid = BufferedGrid(grid, flights)
        return self._grid

    def _landed(self, context: RoundContext) -> dict[int, Flight]:
        """Return node -> its turn, of the updates that end a round; empty without a buffer."""
        if self._grid is None or context.mode != MessageType.TRAIN:
            return {}
        kept = self._grid.flights.close(context.number, self._grid.landed)
        context.sent[:] = [flight.asked for flight in kept if flight.asked is not None]
        return {flight.node: flight for flight in kept}

    def close_training(
        self, context: RoundContext, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord]:
        """Check, average, plug in, evaluate, fingerprint; a failed round changes nothing."""
        watch, number, report = self.watch, context.number, context.report
        landed = self._landed(context)
        if self._grid is not None:
            replies = [r for r in replies if node_of(r, context.sent) in landed]
        good, metrics = self._read(context, replies, landed)
        benched = self.clients.benched_in(number)
        lineage = watch.open_round(number)
        before = state_of(self.averaging)
        summed: Summed | None = None
        if not good:
            why = f"; {self.masked.failure}" if self.masked is not None else ""
            told = report.reasons() + why
            raise RunError(f"round {number}: no owner's adapters could be used: {told}")
        if self.masked is not None:
            arrays, summed = self.average_masked(lineage, good, self.parts.tuning.dense)
            if summed is not None:
                metrics |= report_of(summed) | {"owners": metrics["owners"]}
                report.cohort.steps = summed.counts["steps"]
        else:
            arrays = self.average(context, lineage, good, self.parts.tuning.dense)
        loss = None
        if arrays is not None:
            nodes = {self.clients.names[n]: n for n in (m.metadata.src_node_id for m in good)}
            sent = dict(zip(nodes, good, strict=True)) if self.masked is None else {}
            loss = self.quality.check(watch, lineage, arrays, self._public_loss(), sent, nodes)
        self.record_outcomes(context, report.finished, lineage)
        watch.close_round(lineage)
        row: dict[str, Any] = {"round": number, "train": self._row(context, metrics)}
        row["train"] |= {"partial": bool(report.cohort.lost or benched), "benched": benched}
        row["lineage"] = lineage
        if self.masked is not None:
            row["secure_aggregation"] = self.masked.facts(summed)
        if self._grid is not None:
            self._grid.flights.forget()
            row["buffer"] = self._grid.flights.report()
        row |= self._central_dp(number) | _owners_dp(metrics)
        if lineage.get("rejected") or stop_reason(lineage) or arrays is None:
            arrays = None
            restore(self.averaging, before)
        else:
            self.parts.plug_in(number, tensors(arrays))
            row["plug_in_loss"] = loss
        self.recorder.round(row)
        record = self.report_phase(context, metrics, lineage)
        if reason := stop_reason(lineage):
            raise LineageError(f"round {number}: {reason}")
        if "plug_in_loss" in row:
            record["plug-in-loss"] = row["plug_in_loss"]
        return arrays, record

    def close_evaluation(
        self, context: RoundContext, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Average the owners' held-out losses, weighted by their tokens."""
        _, metrics = self._read(context, replies)
        self.recorder.round({"round": context.number, "evaluate": self._row(context, metrics)})
        return self.report_phase(context, metrics, {})

    # ---- the parts --------------------------------------------------------------------------

    def _read(
        self,
        context: RoundContext,
        replies: Iterable[Message],
        landed: Mapping[int, Flight] = MappingProxyType({}),
    ) -> tuple[list[Message], dict[str, Any]]:
        """Return (acceptable replies in the order of their owners' names, averages)."""
        report, names = context.report, self.clients.names
        masked = self.masked if context.mode == MessageType.TRAIN else None
        schema = reply_schema(self.NAME, f"masked-{context.mode}" if masked else context.mode)

        def accept(node: int, reply: Message) -> Accepted:
            metrics, name = read_reply(schema, reply.content, names.get(node), report)
            self.clients.claim(node, name)  # before the weights: whose they are is to be told
            if masked is not None:
                masked.take(reply)
                report.finished.append(name)
                return name, metrics
            self._check_counts(metrics, context.mode)
            if context.mode == MessageType.TRAIN:
                check_weights(reply.content, context.shapes)
            if node in landed and self._grid is not None:
                now = self.checkpoint.arrays or self.initial_arrays
                self._grid.flights.freshen(landed[node], context.number, reply, now)
            report.finished.append(name)
            return name, metrics

        good, rows = collect(replies, context.sent, names, report, accept)
        report.finished.sort(key=natural)
        report.cohort.steps = int(sum(r.get("steps", 0) for r in rows.values()))
        if masked is not None:
            return good, {"num-examples": 0, "owners": rows}
        headline = watched_score(self.config, context.mode)
        return good, average(rows, self.config.robust.weight_cap, headline=headline)

    def _public_loss(self) -> float:
        """Return the public loss of the last accepted round, or of the base."""
        content = self.recorder.content
        found = [row["plug_in_loss"] for row in content["rounds"] if "plug_in_loss" in row]
        return float(found[-1] if found else content["full_zero_shot_loss"])

    def _check_counts(self, metrics: dict[str, float], mode: str) -> None:
        """Check that an owner's numbers can be of the work that the settings ask for.

        Raises:
            WireError: more steps or targets than there can be.
        """
        train, per_block = self.config.train, self.config.offsite.block - 1
        blocks, of = metrics["num-examples"], "num-examples"
        if mode == MessageType.TRAIN:
            steps = train.epochs * math.ceil(metrics["num-examples"] / train.batch_size)
            steps = min(steps, train.max_steps or steps)
            if metrics["steps"] > steps:
                raise WireError(f"reply's steps={metrics['steps']:g}: must be <= {steps}")
            blocks, of = metrics["steps"] * train.batch_size, "steps"
        if metrics["targets"] > blocks * per_block:
            raise WireError(
                f"reply's targets={metrics['targets']:g}: must be <= {blocks * per_block:g}, "
                f"with its {of}={metrics[of]:g}"
            )

    def _row(self, context: RoundContext, metrics: dict[str, Any]) -> dict[str, Any]:
        return {
            **context.report.to_dict(),
            "metrics": metrics,
            "wall_s": time.perf_counter() - context.began,
            "adapter_bytes": 4 * self.parts.tuning.count(),
            "emulator_bytes": self.parts.files.bytes_down,
            "emulators_sent": self.parts.files.sent,
        }

    def _central_dp(self, number: int) -> dict[str, Any]:
        """What the noise on the averages has cost after that round; empty without it."""
        noise, dp = self.config.offsite.central_dp_noise, self.config.dp
        if not noise:
            return {}
        spent = spent_epsilon(noise, 1.0, number, dp.delta, dp.accountant)
        return {"central_dp": {"epsilon": spent, "delta": dp.delta, "unit": "owner"}}


def _owners_dp(metrics: dict[str, Any]) -> dict[str, Any]:
    """The largest epsilon that an owner says its DP-SGD has cost; empty without any."""
    rows = [row for row in metrics["owners"].values() if "dp-epsilon" in row]
    if not rows:
        return {}
    worst = max(rows, key=lambda row: float(row["dp-epsilon"]))
    spent = {"epsilon": worst["dp-epsilon"], "delta": worst.get("dp-delta")}
    return {"owners_dp": {**spent, "unit": "block"}}
