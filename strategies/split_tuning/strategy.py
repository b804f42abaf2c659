"""SplitTuning: the strategy that holds the top model (SAP, arXiv 2312.15603).

Per round, each sampled owner gets one train message that announces a session.  Inside it the owner
sends privatised representations, the server answers with logits, the owner returns the gradient of
its private-label loss, and the top learns from all connected owners at once.  ``Strategy.start()``
is Flower's own, over a :class:`~strategies.rounds.prompt_grid.PromptGrid`; sessions open in
``configure_*`` and close in ``aggregate_*``, so Flower's wrappers (differential privacy on joint
bottoms, for one) compose.  Under those replies are heard at the round's end, as Flower has it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    Metadata,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result, Strategy

from fedsplit.config import RunConfig
from fedsplit.errors import LineageError, ModelError, RunError, SessionError
from fedsplit.seeding import derive_seed
from fedsplit.wire.authentication import Hello
from fedsplit.wire.link import Link
from fedsplit.wire.replies import reply_schema

from ..rounds.client_manager import Roll
from ..rounds.lineage_setup import average_watched
from ..rounds.lineage_watch import stop_reason
from ..rounds.prompt_grid import PromptGrid
from ..rounds.replies import (
    NO_REPLY,
    Accepted,
    average,
    check_weights,
    collect,
    read_reply,
    reason_of,
    unanswered,
)
from ..sessions.offers import Offers
from ..sessions.owner_session import Member, welcome_header
from ..sessions.representation_cache import RepresentationStore
from ..sessions.transports import MessageHub
from .checkpointing import Keeping, first_step
from .cohort import Cohort
from .parts import ServerParts
from .round import Round, RoundReport, natural
from .run_checkpoint import Begin, SplitState

log = logging.getLogger(__name__)


class SplitTuning(Strategy):
    """Trains the top with owners that keep the bottom, their text and their labels.

    Args:
        config: the run's settings.
        parts: top, optimizer, sessions and records.
        averaging: Flower strategy that averages what owners train, joint bottoms and heads (its
            ``aggregate_train``).

    :meth:`resume` takes an interrupted run up; ``keeping.first`` rounds are then over.
    """

    def __init__(
        self, config: RunConfig, parts: ServerParts, averaging: Strategy | None = None
    ) -> None:
        self.config = config
        self.parts = parts
        self.store = RepresentationStore()
        self._number = 0
        self.averaging = averaging or FedAvg(weighted_by_key="targets")
        self._joint = config.split.bottom == "joint"
        self._shapes: dict[str, tuple[int, ...]] = {}  # of what owners train
        self._asked: set[int] = set()
        self._naming = threading.Lock()
        self._round: Round | None = None
        self._early: list[Message] = []
        self._offers: Offers | None = None
        self._began = 0.0
        self._messages = 0
        self.patience_s = config.session.idle_s  # for a reply, once the session is over
        self._roll = Roll(config, parts.watch)
        self._lineage: dict[str, Any] = {}
        self._cohort = Cohort(
            parts.top,
            parts.optimisation,
            joint=self._joint,
            per_token=config.model.task == "causal-lm",
            positions=parts.positions,
            window=config.session.window,
            on_step=self._on_step,
            denoise=parts.denoise,
        )
        every = config.output.checkpoint_steps
        self.keeping = Keeping(every, self._cohort, self._roll)

    def resume(self, state: SplitState) -> None:
        """Go on where the state's folder says, and keep states there from now on.

        Raises:
            RunError: the folder holds a run of other settings, or no sound state.
        """
        self.keeping.resume(state)

    # ---- Flower's hooks ---------------------------------------------------------------------

    def start(self, grid: Grid, *args: Any, **options: Any) -> Result:
        """Run as Flower does, but hear every reply when it comes."""
        prompt = PromptGrid(
            grid, heard=self._heard, waits_for=self._waits_for, patience_s=self.patience_s
        )
        return super().start(prompt, *args, **options)

    def summary(self) -> None:
        """Log what is about to happen."""
        c = self.config
        log.info(
            "split tuning of %s at k=%d (%s bottom), %s over %s, %.1f %% of the top trained",
            c.model.name, c.split.k, c.split.bottom, c.session.schedule, c.session.transport,
            100 * self.parts.trainable.share,
        )  # fmt: skip

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Open the round's sessions and return one message per sampled owner."""
        number = server_round + self.keeping.first
        self._shapes = {name: tuple(array.shape) for name, array in arrays.items()}
        self.keeping.arrays = arrays
        if self.keeping.trained and server_round == 1:
            return []  # the interrupted run did it, and was killed before its evaluation
        if self.keeping.begin is None:  # else it is what the interrupted run began the round with
            reject = self.config.lineage.gate == "reject"
            self.keeping.good = self.parts.trainable.state() if reject else None
        return self._open(number, MessageType.TRAIN, arrays, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Close the sessions, average what owners trained, check the lineage, record the round."""
        if self._round is None:
            return self.keeping.arrays, None
        server_round += self.keeping.first
        report, good, metrics = self._close(replies)
        self._lineage = self.parts.watch.begin(server_round)
        arrays = None
        if self._shapes:
            good = [m for m in good if self._weights_ok(m, report)]
            arrays = average_watched(
                self.parts.watch,
                self._lineage,
                server_round,
                good,
                self._roll.names,
                self.averaging,
            )
        worked = [self._roll.names[m.metadata.src_node_id] for m in good]
        self._roll.settle(server_round, worked, report.cohort.lost)
        lineage = self._check_lineage(server_round)
        row = {"round": server_round, "train": self._row(report, metrics), "lineage": lineage}
        self.parts.recorder.round(row)
        self._say(server_round, "train", metrics, lineage)
        if not report.cohort.steps:
            lost = "; ".join(f"{name}: {why}" for name, why in report.cohort.lost.items())
            raise RunError(f"round {server_round}: no owner took a step: {lost[:2000]}")
        if reason := stop_reason(lineage):
            raise LineageError(f"round {server_round}: {reason}")
        if lineage.get("rejected"):
            arrays = None  # the bottoms go back with the top: Flower keeps the last ones
        self.keeping.arrays = arrays or self.keeping.arrays
        self.keeping.keep(server_round, "trained")
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
        number = server_round + self.keeping.first
        last = number == self.config.train.rounds
        if not every or (number % every and not last):
            return []
        return self._open(number, MessageType.EVALUATE, arrays, grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Average the owners' reports, weighted by their number of samples."""
        if self._round is None:
            return None
        server_round += self.keeping.first
        report, _, metrics = self._close(replies)
        row = {"round": server_round, "evaluate": self._row(report, metrics)}
        self.parts.recorder.round(row)
        self._say(server_round, "evaluate", metrics, {})
        self.keeping.keep(server_round, "evaluated")
        return MetricRecord({k: v for k, v in metrics.items() if isinstance(v, (int, float))})

    # ---- opening ----------------------------------------------------------------------------

    def _open(self, number: int, mode: str, arrays: ArrayRecord, grid: Grid) -> list[Message]:
        self._began = time.perf_counter()
        nodes = self._roll.sample(grid, number)
        self._asked = set(nodes)
        begin = self.keeping.open(nodes)
        waves = self._waves(grid, nodes, begin)
        nodes = [node for wave in waves for node in wave]
        self.parts.recorder.begin(number, mode, len(nodes))
        session = self.config.session
        rounds = self.config.train.rounds
        self._round = Round(
            number,
            mode,
            nodes,
            self._cohort,
            self._member,
            self.parts.bundle,
            wave=session.wave,
            wait_s=session.wave_wait_s,
            schedule=session.schedule,
            progress=lambda part: (number - 1 + part) / rounds,
            threads=self.config.output.threads,
            seed=derive_seed(self.config.seed, "dropout", mode, number),
            begin=begin,
        )
        hub = self.parts.hub
        self._offers = Offers(
            self.parts.door,
            number,
            mode,
            transport=session.transport,
            address=hub.address if hub is not None else "",
            ca=self.parts.ca,
            digest=self.parts.bundle[1],
            weights=arrays,
            # Each that comes gives the others as much time again.
            lifetime_s=session.wave_wait_s * (1 + max(map(len, waves), default=0)),
            first=lambda node: first_step(self._round, self._roll.names.get(node)),
            job=self.keeping.job,
        )
        self._messages = 2 * len(nodes)
        self._early = []
        if hub is None:
            over = self._message_hub(grid, self._offers.content)
            self._ask(nodes)
            over.run(self._round, nodes)
            self._messages += over.messages
            return [self._offers.message(n, done) for n, done in over.exchanges().items()]
        hub.begin(self._round)
        for wave in waves[:-1]:
            log.info("%d owners in waves of %d: %s", len(nodes), len(wave), self._called(wave))
            self._ask(wave)
            asked = self._offers.messages(wave)
            self._early += grid.send_and_receive(asked, timeout=session.round_s)
        last = waves[-1] if waves else []
        self._ask(last)
        return self._offers.messages(last)

    def _ask(self, wave: list[int]) -> None:
        assert self._round is not None
        self.keeping.ask(wave)
        self._round.ask(wave)

    def _waves(self, grid: Grid, nodes: list[int], begin: Begin | None) -> list[list[int]]:
        """Return who is asked together, in the order of their names.

        All waves but the last are sent from here: Flower hands messages to free slots in an order
        that no seed decides, and which owners share a cohort step must not depend on it.
        """
        size = self.config.session.wave or len(nodes)
        if len(nodes) <= size and begin is None:
            return [nodes]
        self._roll.learn(grid, nodes)
        names = self._roll.names
        nodes = sorted(nodes, key=lambda n: natural(names.get(n, "")))
        waves = [nodes[at : at + size] for at in range(0, len(nodes), size)]
        if begin is None:
            return waves
        left = [[n for n in wave if names.get(n) not in begin.out] for wave in waves]
        return [wave for wave in left if wave]

    def _called(self, nodes: list[int]) -> str:
        return ", ".join(self._roll.names.get(n, str(n)) for n in nodes)

    def _message_hub(self, grid: Grid, content: Callable[[int, int], RecordDict]) -> MessageHub:
        session = self.config.session
        return MessageHub(
            grid,
            self.parts.door,
            content,
            welcome_header(self.parts.bundle[1], session.codec, session.logits_codec),
            max_frame_bytes=session.max_frame_mb << 20,
            deadline_s=session.deadline_s,
            on_bytes=self.parts.recorder.on_bytes,
        )

    def _member(self, link: Link, hello: Hello) -> Member:
        session = self.config.session
        with self._naming:
            others = {self._roll.names.get(n) for n in self._asked if n != hello.node}
            if hello.owner in others:  # two owners of one name would share what is kept by name
                raise SessionError(f"owner's name {hello.owner!r}: another node has it already")
            self._roll.names[hello.node] = hello.owner
        self.parts.recorder.joined(hello.owner, hello.node, link)
        return Member(
            link,
            hello,
            self.store,
            width=self.parts.top.hidden_size,
            max_tokens=min(self.parts.max_tokens, self.config.model.max_tokens),
            joint=self._joint,
            codec=session.codec,
            logits_codec=session.logits_codec,
            deadline_s=session.deadline_s,
            first=first_step(self._round, hello.owner),
        )

    # ---- closing ----------------------------------------------------------------------------

    def _heard(self, asked: Metadata, reply: Message) -> None:
        """Stop waiting for the session of an owner whose app has already ended."""
        if self._round is None or asked.message_type != self._round.mode:  # asked for its name
            return
        why = reason_of(reply) if reply.has_error() else "it replied without a session"
        self._round.hear(asked.dst_node_id, why)

    def _waits_for(self, nodes: set[int]) -> bool:
        return self._round is None or self._round.waits_for(nodes)

    def _close(
        self, replies: Iterable[Message]
    ) -> tuple[RoundReport, list[Message], dict[str, Any]]:
        """Return (report, acceptable replies, their weighted averages)."""
        assert self._round is not None
        assert self._offers is not None
        asked = self._offers.sent
        replies = [*self._early, *replies]
        self._number = self._round.number
        self._round.give_up(unanswered(asked, replies), NO_REPLY)
        report = self._round.join(self.config.session.round_s)
        self._round = None
        if report.error:
            raise RunError(f"{report.mode} round failed: {report.error}")
        names = self._roll.names
        schema = reply_schema("split-tuning", report.mode)

        def accept(node: int, reply: Message) -> Accepted | None:
            metrics, name = read_reply(schema, reply.content, names.get(node), report)
            finished = name in report.finished and names.get(node) == name
            return (name, metrics) if finished else None

        good, rows = collect(replies, asked, names, report, accept)
        return report, good, average(rows)

    def _row(self, report: RoundReport, metrics: dict[str, Any]) -> dict[str, Any]:
        benched = self._roll.sitting(self._number)
        return {
            **report.to_dict(),
            "asked": len(self._asked),
            "partial": bool(report.cohort.lost or benched),
            "benched": benched,
            "metrics": metrics,
            "wall_s": time.perf_counter() - self._began,
            "messages": self._messages,
            "denoising": self.parts.denoise.report() if self.parts.denoise else None,
        }

    def _weights_ok(self, message: Message, report: RoundReport) -> bool:
        """Refuse NaN and foreign tensors from one owner; the others' work is kept."""
        name = self._roll.names[message.metadata.src_node_id]
        try:
            check_weights(message.content, self._shapes)
        except ModelError as error:
            report.cohort.lost[name] = f"update refused: {error}"
            log.warning("owner %s: update refused: %s", name, error)
            return False
        return True

    def _check_lineage(self, number: int) -> dict[str, Any]:
        """Check what the server trained; on a rejected round go back to the last good top."""
        watch, row = self.parts.watch, self._lineage
        changed = [name for name, _ in self.parts.trainable.named_parameters()]
        watch.check_model(row, self.parts.top.model, changed)
        watch.close(row)
        if row.get("rejected") and self.keeping.good is not None:
            self.parts.trainable.load(self.keeping.good)
        return row

    # ---- telling ----------------------------------------------------------------------------

    def _on_step(self, step: int, steps: int) -> None:
        if self._round is not None:
            self.keeping.step(self._round, self._shapes)
            self.parts.recorder.progress(
                round=self._round.number,
                rounds=self.config.train.rounds,
                mode=self._round.mode,
                step=step,
                steps=steps,
                owners=len(self._round.report.waves[-1]) if self._round.report.waves else 0,
                lost=len(self._round.report.cohort.lost),
            )

    def _say(
        self, number: int, mode: str, metrics: dict[str, Any], lineage: dict[str, Any]
    ) -> None:
        self.parts.recorder.phase(number, self.config.train.rounds, mode, metrics, lineage)
