"""OffsiteTuning: owners tune adapters against an emulator, the server plugs them into the model.

Offsite-Tuning (arXiv 2302.04870) and ScaleOT (arXiv 2412.09812): M = [A, E], owners get [A, E*].
Per round each sampled owner gets the averaged adapters in a Flower message and returns its own; the
emulator crosses once, by digest, over a session.  The full model never leaves the server.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    Metadata,
    MetricRecord,
)
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedsplit.config import RunConfig
from fedsplit.emulators.lm import mean_loss
from fedsplit.errors import ConfigError, LineageError, ModelError, RunError
from fedsplit.privacy.dp.accounting import spent_epsilon
from fedsplit.wire.replies import reply_schema

from ..rounds.averaging import restore, set_current_arrays, state_of
from ..rounds.client_manager import ClientManager
from ..rounds.lineage_setup import average_watched, tensors
from ..rounds.lineage_watch import stop_reason
from ..rounds.recorder import Recorder
from ..rounds.replies import Accepted, average, check_weights, collect, read_reply
from ..rounds.report import RoundReport, natural
from ..rounds.run_strategy import RunStrategy
from ..sessions.offers import Offers
from ..settings import Settings, current_run, run_config
from .export import export
from .parts import OffsiteParts, build_parts

log = logging.getLogger(__name__)


class OffsiteTuning(RunStrategy):
    """Averages the owners' adapters and plugs them into the full model.

    Args:
        config: the run's settings.
        parts: model, emulator, sessions and records.
    """

    def __init__(self, config: RunConfig, parts: OffsiteParts) -> None:
        super().__init__(config)
        self.parts = parts
        self._first = self.rounds_done = parts.first
        self._shapes = {n: tuple(p.shape) for n, p in parts.tuning.named_parameters().items()}
        self._clients = ClientManager(config, parts.watch)
        self._asked: list[Metadata] = []
        self._began = 0.0

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
        """Yield a strategy that is ready to start; on leaving, what was trained is exported.

        ::

            with OffsiteTuning.open(context, model="gpt2", compressor="scaleot") as strategy:
                strategy.start(grid)

        The run's folder (``output_dir=...``) gets ``server.json``, ``emulator/`` and
        ``importance/`` (see :mod:`strategies.offsite_tuning.emulator`), ``adapters.safetensors``
        after every round, and at the end ``adapter/`` and ``model/`` (see
        :mod:`strategies.offsite_tuning.export`).

        Args:
            config: what the settings begin with: a RunConfig, flat settings, or the ServerApp's
                context, whose run config and run id are used.
            averaging: Flower strategy or wrapper that averages adapters in its
                ``aggregate_train``; None: as ``offsite.averaging`` says.
            run_id: Flower's id of the run; None: the context's, or this process's.
            settings: see :func:`strategies.settings.run_config`.

        Raises:
            ConfigError, ModelError, LineageError: settings or a model that cannot be used.
            RunError: ``output.dir`` cannot be used or written.
        """
        run_id = current_run(config, run_id)
        config = run_config(config, "offsite-tuning", **settings)
        if config.model.task != "causal-lm" or config.session.transport != "stream":
            raise ConfigError(
                f"model.task={config.model.task!r}, session.transport="
                f"{config.session.transport!r}: must be causal-lm and stream for offsite tuning"
            )
        began = time.perf_counter()
        if config.output.threads:
            torch.set_num_threads(config.output.threads)
        with Recorder.open(config, run_id) as recorder, TemporaryDirectory() as scratch:
            folder = Path(config.output.dir or scratch)
            with closing(build_parts(config, run_id, recorder, folder, averaging)) as parts:
                strategy = cls(config, parts)
                recorder.write(status="running", setup_s=time.perf_counter() - began)
                yield strategy
                if config.output.dir and config.output.save:
                    recorder.write(exported=export(folder, parts.loaded, parts.tuning))
                recorder.write(
                    status="stopped" if strategy.rounds_left else "completed",
                    run_s=time.perf_counter() - began,
                )

    @property
    def initial_arrays(self) -> ArrayRecord:
        """The adapters as they are now: where a start begins with."""
        return self.parts.adapters()

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

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return one message per sampled owner, with the averaged adapters and an offer."""
        set_current_arrays(self.parts.averaging, arrays)
        return self._messages(server_round, MessageType.TRAIN, arrays, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check, average, plug in, evaluate, fingerprint; a failed round changes nothing."""
        watch, number = self.parts.watch, server_round + self._first
        report, good, metrics = self._read("train", replies)
        benched = self._clients.sitting(number)
        self._clients.settle(number, report.finished, report.cohort.lost)
        lineage = watch.begin(number)
        before = state_of(self.parts.averaging)
        self.rounds_done = number
        arrays = average_watched(
            watch,
            lineage,
            number,
            good,
            self._clients.names,
            self.parts.averaging,
            self.parts.tuning.dense,
        )
        if arrays is None and not lineage.get("owners"):
            lost = "; ".join(f"{name}: {why}" for name, why in report.cohort.lost.items())
            raise RunError(f"round {number}: no owner's adapters could be used: {lost[:2000]}")
        watch.close(lineage)
        row: dict[str, Any] = {"round": number, "train": self._row(report, metrics)}
        row["train"] |= {"partial": bool(report.cohort.lost or benched), "benched": benched}
        row["lineage"] = lineage
        row |= self._central_dp(number) | _owners_dp(metrics)
        if lineage.get("rejected") or stop_reason(lineage) or arrays is None:
            arrays = None
            restore(self.parts.averaging, before)
        else:
            state = tensors(arrays)
            self.parts.tuning.load(state)
            row["plug_in_loss"] = mean_loss(self.parts.model, self.parts.public)
            self.parts.keep(number, state)
        self.parts.recorder.round(row)
        self._say(number, "train", metrics, lineage)
        if reason := stop_reason(lineage):
            raise LineageError(f"round {number}: {reason}")
        record = MetricRecord({k: v for k, v in metrics.items() if isinstance(v, int | float)})
        if "plug_in_loss" in row:
            record["plug-in-loss"] = row["plug_in_loss"]
        return arrays, record

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let owners measure the emulator with the averaged adapters on their held-out text."""
        every, number = self.config.output.evaluate_every, server_round + self._first
        if not every or (number % every and number != self.config.train.rounds):
            return []
        return self._messages(server_round, MessageType.EVALUATE, arrays, grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Average the owners' held-out losses, weighted by their tokens."""
        report, _, metrics = self._read("evaluate", replies)
        if not report.finished and not report.cohort.lost:
            return None
        number = server_round + self._first
        self.parts.recorder.round({"round": number, "evaluate": self._row(report, metrics)})
        self._say(number, "evaluate", metrics, {})
        return MetricRecord({k: v for k, v in metrics.items() if isinstance(v, int | float)})

    # ---- the parts --------------------------------------------------------------------------

    def _messages(
        self, server_round: int, mode: str, arrays: ArrayRecord, grid: Grid
    ) -> list[Message]:
        self._began = time.perf_counter()
        number = server_round + self._first
        nodes = self._clients.sample(grid, number)
        self.parts.recorder.begin(number, mode, len(nodes))
        offers = Offers(
            self.parts.stream.authenticator,
            number,
            mode,
            transport="stream",
            address=self.parts.stream.address,
            ca=self.parts.stream.ca,
            digest=self.parts.digest,
            weights=arrays,
        )
        messages, self._asked = offers.messages(nodes), offers.sent
        return messages

    def _read(
        self, mode: str, replies: Iterable[Message]
    ) -> tuple[RoundReport, list[Message], dict[str, Any]]:
        """Return (report, acceptable replies in the order of their owners' names, averages)."""
        report = RoundReport(mode)
        names = self._clients.names
        schema = reply_schema("offsite-tuning", mode)

        def accept(node: int, reply: Message) -> Accepted:
            metrics, name = read_reply(schema, reply.content, names.get(node), report)
            if any(n == name and other != node for other, n in names.items()):
                raise ModelError(f"owner's name {name!r}: another node has it already")
            names[node] = name  # before the weights: whose they are is to be told
            if mode == "train":
                check_weights(reply.content, self._shapes)
            report.finished.append(name)
            return name, metrics

        good, rows = collect(replies, self._asked, names, report, accept)
        report.finished.sort(key=natural)
        report.cohort.steps = int(sum(r.get("steps", 0) for r in rows.values()))
        return report, good, average(rows)

    def _row(self, report: RoundReport, metrics: dict[str, Any]) -> dict[str, Any]:
        size = 4 * self.parts.tuning.count()
        return {
            **report.to_dict(),
            "metrics": metrics,
            "wall_s": time.perf_counter() - self._began,
            "adapter_bytes": size,
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

    def _say(
        self, number: int, mode: str, metrics: dict[str, Any], lineage: dict[str, Any]
    ) -> None:
        self.parts.recorder.phase(number, self.config.train.rounds, mode, metrics, lineage)


def _owners_dp(metrics: dict[str, Any]) -> dict[str, Any]:
    """The largest epsilon that an owner says its DP-SGD has cost; empty without any."""
    rows = [row for row in metrics["owners"].values() if "dp-epsilon" in row]
    if not rows:
        return {}
    worst = max(rows, key=lambda row: float(row["dp-epsilon"]))
    spent = {"epsilon": worst["dp-epsilon"], "delta": worst.get("dp-delta")}
    return {"owners_dp": {**spent, "unit": "block"}}
