"""OffsiteTuning: owners tune adapters against an emulator, the server plugs them into the model.

Offsite-Tuning (arXiv 2302.04870) and ScaleOT (arXiv 2412.09812): M = [A, E], owners get [A, E*].
Per round each sampled owner gets the averaged adapters in a Flower message and returns its own; the
emulator crosses once, by digest, over a session.  The full model never leaves the server.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    Metadata,
    MetricRecord,
)
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

from fedsplit.config import RunConfig
from fedsplit.emulators import Emulator
from fedsplit.emulators.compression.structure import Model
from fedsplit.emulators.lm import mean_loss
from fedsplit.errors import LineageError, ModelError, RunError
from fedsplit.models.adapters.methods import BlockTuning
from fedsplit.privacy.dp.accounting import spent_epsilon
from fedsplit.wire.authentication import Door
from fedsplit.wire.replies import reply_schema

from ..rounds.averaging import remember, restore, state_of
from ..rounds.client_manager import Roll
from ..rounds.lineage_setup import average_watched, tensors
from ..rounds.lineage_watch import LineageWatch, stop_reason
from ..rounds.prompt_grid import PromptGrid
from ..rounds.recorder import Recorder
from ..rounds.replies import Accepted, average, check_weights, collect, read_reply
from ..sessions.offers import Offers
from ..sessions.transports import StreamHub
from ..split_tuning.round import RoundReport, natural
from .file_server import FileDesk

log = logging.getLogger(__name__)


@dataclass
class OffsiteParts:
    """What a run's strategy works with; built by :mod:`strategies.offsite_tuning.run`.

    Attributes:
        model: the full model; adapters are plugged into it after every round.
        emulator: what owners train.
        tuning: what is trained, in A of the full model.
        digest: of the emulator's files.
        public: held-out public blocks (N, T) that the plugged-in model is evaluated on.
        door: issues and redeems session tokens.
        hub: the stream server.
        desk: hands out the emulator.
        watch: the lineage gate.
        recorder: writes what happened.
        averaging: Flower strategy that averages.
        keep: called with (round, adapters) after every accepted round, for crashes to lose little.
        ca: PEM that owners should trust for the stream.
    """

    model: Model
    emulator: Emulator
    tuning: BlockTuning
    digest: str
    public: Tensor
    door: Door
    hub: StreamHub
    desk: FileDesk
    watch: LineageWatch
    recorder: Recorder
    averaging: Strategy
    keep: Callable[[int, dict[str, Tensor]], None]
    ca: bytes = b""


class OffsiteTuning(Strategy):
    """Averages the owners' adapters and plugs them into the full model.

    Args:
        config: the run's settings.
        parts: model, emulator, sessions and records.
        first: rounds done by an earlier, interrupted start of the same run.
    """

    def __init__(self, config: RunConfig, parts: OffsiteParts, first: int = 0) -> None:
        self.config = config
        self.parts = parts
        self._first = first
        self._shapes = {n: tuple(p.shape) for n, p in parts.tuning.named_parameters().items()}
        self._roll = Roll(config, parts.watch)
        self._asked: list[Metadata] = []
        self._began = 0.0

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

    def start(self, grid: Grid, *args: Any, **options: Any) -> Result:
        """Run as Flower does, but find replies sooner than every three seconds."""
        return super().start(PromptGrid(grid), *args, **options)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return one message per sampled owner, with the averaged adapters and an offer."""
        remember(self.parts.averaging, arrays)
        return self._messages(server_round, MessageType.TRAIN, arrays, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check, average, plug in, evaluate, fingerprint; a failed round changes nothing."""
        watch, number = self.parts.watch, server_round + self._first
        report, good, metrics = self._read("train", replies)
        benched = self._roll.sitting(number)
        self._roll.settle(number, report.finished, report.cohort.lost)
        lineage = watch.begin(number)
        before = state_of(self.parts.averaging)
        arrays = average_watched(
            watch,
            lineage,
            number,
            good,
            self._roll.names,
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
        every, last = self.config.output.evaluate_every, self._rounds
        if not every or (server_round % every and server_round != last):
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

    @property
    def _rounds(self) -> int:
        """Rounds that this start has left to do."""
        return self.config.train.rounds - self._first

    def _messages(
        self, server_round: int, mode: str, arrays: ArrayRecord, grid: Grid
    ) -> list[Message]:
        self._began = time.perf_counter()
        number = server_round + self._first
        nodes = self._roll.sample(grid, number)
        self.parts.recorder.begin(number, mode, len(nodes))
        offers = Offers(
            self.parts.door,
            number,
            mode,
            transport="stream",
            address=self.parts.hub.address,
            ca=self.parts.ca,
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
        names = self._roll.names
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
            "emulator_bytes": self.parts.desk.bytes_down,
            "emulators_sent": self.parts.desk.sent,
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
