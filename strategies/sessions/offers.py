"""The messages that announce a round's sessions to its owners."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from fedsplit.wire.authentication import SessionAuthenticator
from fedsplit.wire.messages import OFFER, WEIGHTS, SessionOffer

from ..rounds.round_context import RoundContext
from .transports import StreamTransport


class Offers:
    """Makes one round's offers, each with a token of its own.

    Args:
        context: the round; is told of the messages that are made.
        authenticator: issues the tokens.
        stream: where owners connect; None: over Flower messages.
        digest: of the files that sessions hand out.
        weights: what owners go on from, sent with the first message of each; empty: nothing.
        lifetime_s: of the tokens; None: as the token book has it.
        job: names the run across its restarts.

    Attributes:
        extra: node -> what its message carries beside the offer; None: nothing.
    """

    def __init__(
        self,
        context: RoundContext,
        authenticator: SessionAuthenticator,
        stream: StreamTransport | None,
        *,
        digest: str,
        weights: ArrayRecord,
        lifetime_s: float | None = None,
        job: str = "",
    ) -> None:
        self._context = context
        self._authenticator = authenticator
        self._stream = stream
        self._digest = digest
        self._weights = weights
        self._lifetime_s = lifetime_s
        self._job = job
        self.extra: Callable[[int], Mapping[str, ConfigRecord]] | None = None

    def content(self, node: int, exchange: int = 0) -> RecordDict:
        """Return a new RecordDict: one shared by all nodes would share their tokens too."""
        context, stream = self._context, self._stream
        number, mode = context.number, context.mode
        offer = SessionOffer(
            run=self._authenticator.run,
            node=node,
            round=number,
            mode=mode,
            transport="messages" if stream is None else "stream",
            token=self._authenticator.issue(node, number, mode, self._lifetime_s),
            address="" if stream is None else stream.address,
            ca=b"" if stream is None else stream.ca,
            digest=self._digest,
            exchange=exchange,
            first=context.first_step(context.names.get(node)),
            job=self._job,
        )
        record = RecordDict({OFFER: offer.to_record()})
        if len(self._weights) and exchange == 0:
            record[WEIGHTS] = self._weights
        return record

    def message(self, node: int, exchange: int = 0) -> Message:
        """Return the node's message, to be sent."""
        content = self.content(node, exchange)
        for name, record in (self.extra(node) if self.extra is not None else {}).items():
            content[name] = record
        made = Message(content, dst_node_id=node, message_type=self._context.mode)
        self._context.sent.append(made.metadata)
        return made

    def messages(self, nodes: Iterable[int]) -> list[Message]:
        """Return each node's first message."""
        return [self.message(node) for node in nodes]
