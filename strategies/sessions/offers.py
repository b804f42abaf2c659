"""The messages that announce a round's sessions to its owners."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from flwr.app import ArrayRecord, Message, Metadata, RecordDict

from fedsplit.wire.authentication import SessionAuthenticator
from fedsplit.wire.messages import OFFER, WEIGHTS, SessionOffer


class Offers:
    """Makes one round's offers, each with a token of its own.

    Args:
        authenticator: issues the tokens.
        number: of the round, from 1.
        mode: ``train`` or ``evaluate``; also the Flower message's type.
        transport: of the sessions.
        address: where the session server is reached; empty over messages.
        ca: PEM of its authority.
        digest: of the files that sessions hand out.
        weights: what owners go on from, sent with the first message of each; empty: nothing.
        lifetime_s: of the tokens; None: as the token book has it.
        first: node -> the step of its session that an interrupted run had come to.
        job: names the run across its restarts.
    """

    def __init__(
        self,
        authenticator: SessionAuthenticator,
        number: int,
        mode: str,
        *,
        transport: str,
        address: str,
        ca: bytes,
        digest: str,
        weights: ArrayRecord,
        lifetime_s: float | None = None,
        first: Callable[[int], int] = lambda node: 0,
        job: str = "",
    ) -> None:
        self.mode = mode
        self.sent: list[Metadata] = []  # Flower gives them their ids when it sends them
        self._authenticator = authenticator
        self._number = number
        self._transport = transport
        self._address = address
        self._ca = ca
        self._digest = digest
        self._weights = weights
        self._lifetime_s = lifetime_s
        self._first = first
        self._job = job

    def content(self, node: int, exchange: int = 0) -> RecordDict:
        """Return a new RecordDict: one shared by all nodes would share their tokens too."""
        run = self._authenticator.run
        offer = SessionOffer(
            run=run,
            node=node,
            round=self._number,
            mode=self.mode,
            transport=self._transport,
            token=self._authenticator.issue(node, self._number, self.mode, self._lifetime_s),
            address=self._address,
            ca=self._ca,
            digest=self._digest,
            exchange=exchange,
            first=self._first(node),
            job=self._job,
        )
        record = RecordDict({OFFER: offer.to_record()})
        if len(self._weights) and exchange == 0:
            record[WEIGHTS] = self._weights
        return record

    def message(self, node: int, exchange: int = 0) -> Message:
        """Return the node's message, to be sent."""
        made = Message(self.content(node, exchange), dst_node_id=node, message_type=self.mode)
        self.sent.append(made.metadata)
        return made

    def messages(self, nodes: Iterable[int]) -> list[Message]:
        """Return each node's first message."""
        return [self.message(node) for node in nodes]
