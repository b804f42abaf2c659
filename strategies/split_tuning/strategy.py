"""SplitTuning: the strategy that holds the top model (SAP, arXiv 2312.15603).

Per round, each sampled owner gets one train message that announces a session.  Inside it the owner
sends privatised representations, the server answers with logits, the owner returns the gradient of
its private-label loss, and the top learns from all connected owners at once.  ``Strategy.start()``
is Flower's own, over a :class:`~strategies.rounds.polling_grid.PollingGrid`; sessions open in
``configure_*`` and close in ``aggregate_*``, so Flower's wrappers (differential privacy on joint
bottoms, for one) compose.  A wrapper's own ``start()`` sees replies at the round's end only.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Self

from flwr.app import ArrayRecord, Message, MessageType, Metadata, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedsplit.config import RunConfig
from fedsplit.data import names_digest
from fedsplit.errors import LineageError, ModelError, RunError, SessionError
from fedsplit.models.trained import FILE
from fedsplit.models.trained.weights import described, save_trained
from fedsplit.tasks import task_of
from fedsplit.wire.authentication import Hello
from fedsplit.wire.link import Link
from fedsplit.wire.replies import reply_schema

from ..early_stopping import watched_score
from ..rounds.lineage_watch import stop_reason
from ..rounds.polling_grid import PollingGrid
from ..rounds.recorder import Recorder
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
from ..rounds.report import natural
from ..rounds.round_context import ResumePoint, RoundContext
from ..rounds.run_checkpoint import tensors_of
from ..rounds.run_strategy import HandedOut, RunStrategy
from ..secure_aggregation.averaging import check_weight
from ..sessions.offers import Offers
from ..sessions.owner_session import OwnerSession, welcome_header
from ..sessions.representation_cache import RepresentationCache
from ..sessions.transports import MessageTransport
from .cohort import Cohort
from .parts import ServerParts, build_parts
from .session_round import SessionRound

log = logging.getLogger(__name__)

APPLICATION_ERRORS = 100  # from here on codes are the ClientApp's, which has told its session why


class SplitTuning(RunStrategy):
    """Trains the top with owners that keep the bottom, their text and their labels.

    :meth:`open` with plain settings; the run's folder (``output_dir=...``) gets ``server.json``,
    states to go on from, and at the end ``top.safetensors``, which serving loads::

        with SplitTuning.open(context, model="gpt2", task="causal-lm", k=2) as strategy:
            strategy.start(grid)

    Args:
        config: the run's settings.
        parts: top, optimizer, sessions and records.
        averaging: Flower strategy that averages what owners train, joint bottoms and heads; None:
            as ``split.averaging`` says.

    Attributes:
        store: representations received.
        patience_s: longest wait for a reply once its session is over.
    """

    NAME = "split-tuning"

    def __init__(
        self, config: RunConfig, parts: ServerParts, averaging: Strategy | None = None
    ) -> None:
        self.store = RepresentationCache()
        super().__init__(config, parts, averaging, self.store)
        self.parts = parts
        self.patience_s = config.session.idle_s
        self._naming = threading.Lock()
        self.task = task_of(config)
        names = self.task.announced(config.model)
        # (digest, whose); without an announced list the first owner's is everyone's
        self._classes = (names_digest(names), "the announced ones") if names else None
        self._sessions: SessionRound | None = None
        self._cohort = Cohort(parts.model, parts.forward, parts.optimisation, config, self._on_step)

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
        return cls(config, build_parts(config, run_id, recorder), averaging)

    def close(self) -> None:
        """Close all sessions and the session server's port."""
        self.parts.close()

    @property
    def initial_arrays(self) -> ArrayRecord:
        """What owners train, as it is now: what a start begins with."""
        return self.checkpoint.arrays or self.parts.initial

    @property
    def handed_out(self) -> HandedOut:
        """The bottom, with the owners' head if they hold it."""
        bundle = self.parts.model.bundle
        return HandedOut("bottoms", bundle.digest, bundle.files)

    def write_results(self) -> None:
        """Write what was trained, and the transcript, as the settings say.

        Raises:
            RunError: it cannot be written.
        """
        output = self.config.output
        if output.dir and output.save:
            belongs = described(self.config, self.parts.model.base_digest)
            trained = self.parts.model.trainable.state()
            owners = tensors_of(self.checkpoint.arrays)
            save_trained(Path(output.dir) / FILE, trained, owners, belongs)
        if output.transcript:
            self.recorder.transcript(self.store)

    def summary(self) -> None:
        """Log what is about to happen."""
        c = self.config
        log.info(
            "split tuning of %s at k=%d (%s bottom), %s over %s, %.1f %% of the top trained",
            c.model.name, c.split.k, c.split.bottom, c.session.schedule, c.session.transport,
            100 * self.parts.model.trainable.share,
        )  # fmt: skip

    # ---- opening ----------------------------------------------------------------------------

    def waves(self, grid: Grid, nodes: list[int], resume: ResumePoint | None) -> list[list[int]]:
        """Return who is asked together, in the order of their names.

        All waves but the last are sent from here: Flower hands messages to free slots in an order
        that no seed decides, and which owners share a cohort step must not depend on it.
        """
        size = self.config.session.wave or len(nodes)
        if len(nodes) <= size and resume is None:
            return [nodes]
        self.clients.ask_names(grid, nodes)
        names = self.clients.names
        nodes = sorted(nodes, key=lambda n: natural(names.get(n, "")))
        waves = [nodes[at : at + size] for at in range(0, len(nodes), size)]
        if resume is None:
            return waves
        left = [[n for n in wave if names.get(n) not in resume.out] for wave in waves]
        return [wave for wave in left if wave]

    def open_round(self, context: RoundContext, arrays: ArrayRecord, grid: Grid) -> list[Message]:
        """Open the round's sessions; return the messages of its last wave."""
        parts, session = self.parts, self.config.session
        if context.mode == MessageType.TRAIN and context.resume is None:
            reject = self.config.lineage.gate == "reject"
            self.checkpoint.good = parts.model.trainable.state() if reject else None
        offers = Offers(
            context,
            parts.authenticator,
            parts.stream,
            digest=parts.model.bundle.digest,
            weights=arrays,
            # Every owner that connects prolongs the wait for the rest of its wave.
            lifetime_s=session.wave_wait_s * (1 + max(map(len, context.waves), default=0)),
            job=self.checkpoint.job,
        )
        self.open_masked(context, offers, grid, parts.authenticator.run)
        round_ = SessionRound(context, self._cohort, self._make_session, parts.model.bundle)
        self._sessions = round_
        context.messages += 2 * len(context.expected)
        if parts.stream is None:
            transport = MessageTransport(
                grid,
                parts.authenticator,
                session,
                offers.content,
                welcome_header(parts.model.bundle.digest, session.codec, session.logits_codec),
                self.recorder.on_bytes,
            )
            round_.mark_asked(context.expected)
            transport.run(round_, context.expected)
            context.messages += transport.messages
            return [offers.message(n, done) for n, done in transport.exchanges().items()]
        parts.stream.serve(round_)
        for wave in context.waves[:-1]:
            called = ", ".join(context.names.get(n, str(n)) for n in wave)
            log.info("%d owners in waves of %d: %s", len(context.expected), len(wave), called)
            round_.mark_asked(wave)
            asked = offers.messages(wave)
            context.replies += grid.send_and_receive(asked, timeout=session.round_s)
        last = context.waves[-1] if context.waves else []
        round_.mark_asked(last)
        return offers.messages(last)

    def _make_session(self, link: Link, hello: Hello) -> OwnerSession:
        context = self.round
        if context is None:
            raise SessionError("no round is under way")
        self.clients.claim(hello.node, hello.owner)  # what is kept by name is kept by it
        with self._naming:
            self._check_classes(hello)
        self.recorder.session_opened(hello.owner, hello.node, link)
        return OwnerSession(
            link,
            hello,
            self.store,
            self.config,
            width=self.parts.model.top.hidden_size,
            joint=self.config.split.bottom == "joint",
            first=context.first_step(hello.owner),
            # Owners evaluate in batches of twice the size, since no gradients are kept.
            batch_size=self.config.train.batch_size * (1 if context.mode == "train" else 2),
        )

    def _check_classes(self, hello: Hello) -> None:
        """Refuse an owner whose classes are not those of the others: an index would mean two."""
        if not hello.classes:
            return
        if self._classes is None:
            self._classes = hello.classes, f"those of {hello.owner}"
        digest, whose = self._classes
        if hello.classes != digest:
            raise SessionError(
                f"classes of owner {hello.owner!r}: must be {whose}; announce "
                f"model.{self.task.terms_setting}"
            )

    # ---- while it runs ----------------------------------------------------------------------

    def polling(self, grid: Grid) -> PollingGrid:
        """Return a grid that tells the round of every reply."""
        return PollingGrid(
            grid,
            on_reply=self._on_reply,
            is_needed=self._is_waiting_for,
            patience_s=self.patience_s,
        )

    def _on_reply(self, asked: Metadata, reply: Message) -> None:
        """Stop waiting for the session of an owner whose app has already ended."""
        round_ = self._sessions
        if round_ is None or asked.message_type != round_.context.mode:  # asked for its name
            return
        why = reason_of(reply) if reply.has_error() else "it replied without a session"
        if reply.has_error() and reply.error.code < APPLICATION_ERRORS:
            # Flower's own: the app has gone without a word, and its session has nobody in it.
            round_.abandon([asked.dst_node_id], why)
        round_.stop_expecting(asked.dst_node_id, why)

    def _is_waiting_for(self, nodes: set[int]) -> bool:
        return self._sessions is None or self._sessions.is_waiting_for(nodes)

    def _on_step(self, context: RoundContext) -> None:
        if not self.parts.optimisation.pending:  # what waits is in no state
            self.checkpoint.save_step(context)
        waves = context.report.waves
        self.recorder.progress(
            round=context.number,
            rounds=self.config.train.rounds,
            mode=context.mode,
            step=context.position.step,
            steps=context.position.steps,
            owners=len(waves[-1]) if waves else 0,
            lost=len(context.report.cohort.lost),
        )

    # ---- closing ----------------------------------------------------------------------------

    def close_training(
        self, context: RoundContext, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord]:
        """Close the sessions, average what owners trained, check the lineage, record the round."""
        number, report, names = context.number, context.report, self.clients.names
        good, metrics = self._close(context, replies)
        lineage = self.watch.open_round(number)
        arrays, told = None, {}
        if context.shapes:
            good = [m for m in good if self._weights_ok(m, context)]
            if self.masked is not None:
                counted = [report.targets[names[m.metadata.src_node_id]] for m in good]
                check = partial(check_weight, counted, self.config.secure.most_targets)
                arrays, summed = self.average_masked(lineage, good, check=check)
                told["secure_aggregation"] = self.masked.facts(summed)
            else:
                arrays = self.average(context, lineage, good)
        worked = [names[m.metadata.src_node_id] for m in good]
        self.record_outcomes(context, worked, lineage)
        self._check_lineage(lineage)
        row = {"round": number, "train": self._row(context, metrics), "lineage": lineage, **told}
        self.recorder.round(row)
        record = self.report_phase(context, metrics, lineage)
        if not report.cohort.steps:
            raise RunError(f"round {number}: no owner took a step: {report.reasons()}")
        if reason := stop_reason(lineage):
            raise LineageError(f"round {number}: {reason}")
        for key in ("pcs", "ics", "score"):
            if isinstance(lineage.get(key), float):
                record[f"lineage-{key}"] = lineage[key]
        record["lineage-ok"] = int(lineage.get("verdict") in ("in_lineage", "off"))
        # After a rejected round the bottoms go back with the top: Flower keeps the last ones.
        return (None if lineage.get("rejected") else arrays), record

    def close_evaluation(
        self, context: RoundContext, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Average the owners' reports, weighted by their number of samples."""
        _, metrics = self._close(context, replies)
        self.recorder.round({"round": context.number, "evaluate": self._row(context, metrics)})
        return self.report_phase(context, metrics, {})

    def _close(
        self, context: RoundContext, replies: Iterable[Message]
    ) -> tuple[list[Message], dict[str, Any]]:
        """Return (acceptable replies, their weighted averages); the report is complete then."""
        report, names, asked = context.report, self.clients.names, context.sent
        replies = [*context.replies, *replies]
        round_, self._sessions = self._sessions, None
        if round_ is not None:
            round_.abandon(unanswered(asked, replies), NO_REPLY)
            round_.join(self.config.session.round_s)
        if report.error:
            raise RunError(f"{report.mode} round failed: {report.error}")
        schema = reply_schema(self.NAME, report.mode, self.task.families())

        def accept(node: int, reply: Message) -> Accepted | None:
            metrics, name = read_reply(schema, reply.content, names.get(node), report)
            finished = name in report.finished and names.get(node) == name
            return (name, metrics) if finished else None

        good, rows = collect(replies, asked, names, report, accept)
        cap, headline = self.config.robust.weight_cap, watched_score(self.config, report.mode)
        return good, average(rows, cap, self.task.scores, headline)

    def _row(self, context: RoundContext, metrics: dict[str, Any]) -> dict[str, Any]:
        report, denoise = context.report, self.parts.model.denoise
        benched = self.clients.benched_in(context.number)
        return {
            **report.to_dict(),
            "asked": len(context.nodes),
            "partial": bool(report.cohort.lost or benched),
            "benched": benched,
            "metrics": metrics,
            "wall_s": time.perf_counter() - context.began,
            "messages": context.messages,
            "denoising": denoise.report() if denoise else None,
        }

    def _weights_ok(self, message: Message, context: RoundContext) -> bool:
        """Refuse NaN and foreign tensors from one owner; the others' work is kept."""
        name = self.clients.names[message.metadata.src_node_id]
        try:
            if self.masked is None:
                check_weights(message.content, context.shapes)
            else:
                self.masked.take(message)
        except (ModelError, SessionError) as error:
            context.report.cohort.lost[name] = f"update refused: {error}"
            log.warning("owner %s: update refused: %s", name, error)
            return False
        return True

    def _check_lineage(self, row: dict[str, Any]) -> None:
        """Check what the server trained; on a rejected round go back to the last good top."""
        trainable = self.parts.model.trainable
        changed = [name for name, _ in trainable.named_parameters()]
        self.watch.check_model(row, self.parts.model.top.model, changed)
        self.watch.close_round(row)
        if row.get("rejected") and self.checkpoint.good is not None:
            trainable.load(self.checkpoint.good)
