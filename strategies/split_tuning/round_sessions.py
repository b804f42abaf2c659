"""Opening and closing the sessions of one round after another."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial

from flwr.app import ArrayRecord, Message, Metadata, RecordDict
from flwr.serverapp import Grid

from fedsplit.config import RunConfig
from fedsplit.errors import RunError, SessionError
from fedsplit.wire.authentication import Hello
from fedsplit.wire.link import Link

from ..rounds.client_manager import ClientManager
from ..rounds.replies import NO_REPLY, reason_of, unanswered
from ..rounds.report import natural
from ..sessions.offers import Offers
from ..sessions.owner_session import OwnerSession, welcome_header
from ..sessions.representation_cache import RepresentationCache
from ..sessions.transports import MessageTransport
from .cohort import Cohort
from .parts import ServerParts
from .round import Round
from .round_context import ResumePoint, RoundContext

log = logging.getLogger(__name__)


class RoundSessions:
    """The sessions of the round under way, at most one at a time.

    Args:
        config: the run's settings.
        parts: the cut model, the transport and the records.
        cohort: steps the top.
        clients: who is sampled, and under which name.
        cache: representations received.
    """

    def __init__(
        self,
        config: RunConfig,
        parts: ServerParts,
        cohort: Cohort,
        clients: ClientManager,
        cache: RepresentationCache,
    ) -> None:
        self._config = config
        self._parts = parts
        self._cohort = cohort
        self._clients = clients
        self._cache = cache
        self._round: Round | None = None
        self._offers: Offers | None = None
        self._naming = threading.Lock()

    @property
    def context(self) -> RoundContext | None:
        """The round under way."""
        return None if self._round is None else self._round.context

    @property
    def offers(self) -> list[Metadata]:
        """What the last round's offers were sent as."""
        return [] if self._offers is None else self._offers.sent

    def open(
        self,
        grid: Grid,
        number: int,
        mode: str,
        arrays: ArrayRecord,
        *,
        resume: ResumePoint | None,
        job: str,
    ) -> list[Message]:
        """Open a round and return the messages that Flower has to send, one per owner.

        Args:
            grid: Flower's.
            number: server round, from 1.
            mode: ``train`` or ``evaluate``.
            arrays: what owners train, as the round begins with it.
            resume: where an interrupted run had come to in this round, or None.
            job: names the run across its restarts.
        """
        began = time.perf_counter()
        nodes = self._clients.sample(grid, number)
        waves = self._waves(grid, nodes, resume)
        context = RoundContext(
            self._config, number, mode, tuple(nodes), waves, arrays, resume, began=began
        )
        context.messages = 2 * len(context.nodes)
        self._parts.recorder.begin(number, mode, len(context.nodes))
        bundle, stream = self._parts.model.bundle, self._parts.stream
        current = Round(context, self._cohort, partial(self._session, context), bundle)
        self._round = current
        session = self._config.session
        self._offers = offers = Offers(
            self._parts.authenticator,
            number,
            mode,
            transport=session.transport,
            address=stream.address if stream is not None else "",
            ca=stream.ca if stream is not None else b"",
            digest=bundle.digest,
            weights=arrays,
            lifetime_s=context.lifetime_s,
            first=lambda node: context.first_step(self._clients.names.get(node)),
            job=job,
        )
        if stream is None:
            over = self._message_transport(grid, offers.content)
            current.ask(context.nodes)
            over.run(current, context.nodes)
            context.messages += over.messages
            return [offers.message(n, done) for n, done in over.exchanges().items()]
        stream.serve(current)
        for wave in waves[:-1]:
            log.info(
                "%d owners in waves of %d: %s", len(context.nodes), len(wave), self._called(wave)
            )
            current.ask(wave)
            asked = offers.messages(wave)
            context.replies += grid.send_and_receive(asked, timeout=session.round_s)
        last = waves[-1] if waves else []
        current.ask(last)
        return offers.messages(last)

    def _waves(self, grid: Grid, nodes: list[int], resume: ResumePoint | None) -> list[list[int]]:
        """Return who is asked together, in the order of their names.

        All waves but the last are sent from here: Flower hands messages to free slots in an order
        that no seed decides, and which owners share a cohort step must not depend on it.
        """
        size = self._config.session.wave or len(nodes)
        if len(nodes) <= size and resume is None:
            return [nodes]
        self._clients.learn(grid, nodes)
        names = self._clients.names
        nodes = sorted(nodes, key=lambda n: natural(names.get(n, "")))
        waves = [nodes[at : at + size] for at in range(0, len(nodes), size)]
        if resume is None:
            return waves
        left = [[n for n in wave if names.get(n) not in resume.out] for wave in waves]
        return [wave for wave in left if wave]

    def _called(self, nodes: list[int]) -> str:
        return ", ".join(self._clients.names.get(n, str(n)) for n in nodes)

    def _message_transport(
        self, grid: Grid, content: Callable[[int, int], RecordDict]
    ) -> MessageTransport:
        session = self._config.session
        return MessageTransport(
            grid,
            self._parts.authenticator,
            content,
            welcome_header(self._parts.model.bundle.digest, session.codec, session.logits_codec),
            max_frame_bytes=session.max_frame_mb << 20,
            deadline_s=session.deadline_s,
            on_bytes=self._parts.recorder.on_bytes,
        )

    def _session(self, context: RoundContext, link: Link, hello: Hello) -> OwnerSession:
        session = self._config.session
        with self._naming:
            others = {self._clients.names.get(n) for n in context.sampled if n != hello.node}
            if hello.owner in others:  # two owners of one name would share what is kept by name
                raise SessionError(f"owner's name {hello.owner!r}: another node has it already")
            self._clients.names[hello.node] = hello.owner
        self._parts.recorder.joined(hello.owner, hello.node, link)
        return OwnerSession(
            link,
            hello,
            self._cache,
            width=self._parts.model.top.hidden_size,
            max_tokens=self._config.model.max_tokens,
            joint=self._config.split.bottom == "joint",
            codec=session.codec,
            logits_codec=session.logits_codec,
            deadline_s=session.deadline_s,
            first=context.first_step(hello.owner),
        )

    def on_reply(self, asked: Metadata, reply: Message) -> None:
        """Stop waiting for the session of an owner whose app has already ended."""
        current = self._round
        if current is None or asked.message_type != current.context.mode:  # asked for its name
            return
        why = reason_of(reply) if reply.has_error() else "it replied without a session"
        current.stop_waiting(asked.dst_node_id, why)

    def waits_for(self, nodes: set[int]) -> bool:
        """Return whether the round still needs one of these nodes."""
        return self._round is None or self._round.waits_for(nodes)

    def close(self, replies: Iterable[Message]) -> RoundContext | None:
        """Wait for the round under way and return it; None if there is none.

        Raises:
            RunError: the round failed as a whole.
        """
        current, offers = self._round, self._offers
        if current is None or offers is None:
            return None
        context = current.context
        context.replies += replies
        current.abandon(unanswered(offers.sent, context.replies), NO_REPLY)
        report = current.join(self._config.session.round_s)
        self._round = None
        if report.error:
            raise RunError(f"{report.mode} round failed: {report.error}")
        return context
