"""One round's masked sum over Flower messages: four questions beside the training message.

Keys and shares are exchanged before owners train; the training message hands on the sealed shares
and its reply brings masked numbers; then the owners that answered confirm who is in the sum, and
reveal what takes the masks off.  An owner that fails at any point is lost for the round, and as
many as ``secure.threshold`` leaves may be.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedsplit.config import RunConfig
from fedsplit.errors import FedsplitError, PrivacyError, SessionError
from fedsplit.privacy.secure_aggregation.numbers import (
    Numbers,
    Summed,
    occasion_of,
    quantiser_of,
)
from fedsplit.privacy.secure_aggregation.owner import KEY, OWN
from fedsplit.privacy.secure_aggregation.roster import Advert
from fedsplit.wire import secure_sum as wire
from fedsplit.wire.message_types import SECURE_TYPE

from ..rounds.client_manager import ClientManager
from ..rounds.replies import node_of, reason_of
from ..rounds.round_context import RoundContext
from .masked_sum import MaskedSum

log = logging.getLogger(__name__)

MOST_ADVERT = 1024


class MaskedRound:
    """The masked sum of one round.

    Args:
        config: the run's settings.
        run: Flower's run id.
        context: the round; told of whoever is lost.
        clients: the owners' names.
        offer: node -> content of a message to it, with an offer of the round.
        grid: Flower's.

    Attributes:
        failure: why there will be no sum; empty while there may be one.
        seconds: the server's own, waiting left out.
        bytes_up: of records that came, masked numbers included.
        bytes_down: of records that went.
    """

    def __init__(
        self,
        config: RunConfig,
        run: int,
        context: RoundContext,
        clients: ClientManager,
        offer: Callable[[int], RecordDict],
        grid: Grid,
    ) -> None:
        self._config = config
        self._context = context
        self._clients = clients
        self._offer = offer
        self._grid = grid
        self._occasion = occasion_of(config, run, context.number)
        self._numbers = Numbers(dict(context.shapes))
        self._sum: MaskedSum | None = None
        self._places: dict[int, int] = {}  # node -> place in the roster
        self.failure = ""
        self.seconds = 0.0
        self.bytes_up = self.bytes_down = 0

    # ---- before owners train ----------------------------------------------------------------

    def prepare(self) -> None:
        """Exchange keys and shares; owners that fail are left out of the round.

        Raises:
            ConfigError: a sum over so many owners could wrap around.
        """
        context, secure = self._context, self._config.secure
        adverts: dict[int, Advert] = {}
        for node, values in self._ask(wire.KEYS, {n: {} for n in context.expected}).items():
            with self._losing(node):
                advert = Advert.from_bytes(wire.bytes_of(values, "advert", MOST_ADVERT))
                advert.check(self._occasion)
                self._clients.claim(node, advert.name)
                adverts[node] = advert
        quantiser_of(self._config, max(2, len(adverts)))
        if len(adverts) < secure.min_owners:
            self._fail(f"owners with keys={len(adverts)}: must be >= {secure.min_owners}", [])
            return
        sum_ = MaskedSum.of(
            self._occasion, list(adverts.values()), secure.neighbours, secure.threshold
        )
        self._sum = sum_
        self._places = {node: sum_.place(advert.name) for node, advert in adverts.items()}
        roster = b"".join(sum_.roster.digests)
        texts = [advert.to_bytes() for advert in sum_.adverts]
        asked = {
            node: {"roster": roster, "adverts": [texts[near] for near in sum_.roster.around(at)]}
            for node, at in self._places.items()
        }
        for node, values in self._ask(wire.SHARES, asked).items():
            with self._losing(node):
                sealed = wire.table_of(values, wire.SEALED_BYTES)
                commitment = wire.bytes_of(values, "commitment", wire.DIGEST_BYTES)
                sum_.take_shares(self._places[node], sealed, commitment)
        ready = [node for node, at in self._places.items() if at in sum_.sealed]
        if len(ready) < secure.min_owners:
            told = f"owners with shares={len(ready)}: must be >= {secure.min_owners}"
            self._fail(told, [])
        self._keep(ready)

    def records(self, node: int) -> dict[str, ConfigRecord]:
        """Return what the node's training message carries beside its offer."""
        assert self._sum is not None
        shares = self._sum.shares_for(self._places[node])
        values = wire.pack_table(shares)
        self.bytes_down += _size(values)
        return {wire.SECURE: wire.secure_record(wire.NUMBERS, **values)}

    # ---- when they have ---------------------------------------------------------------------

    def take(self, reply: Message) -> None:
        """Add one owner's masked numbers.

        Raises:
            SessionError: they are not what is due.
        """
        if self._sum is None:
            raise SessionError("masked sum: there is none in this round")
        began = time.perf_counter()
        quantiser = quantiser_of(self._config, len(self._sum.adverts))
        dtype, size = quantiser.dtype, self._numbers.size
        at = self._places.get(reply.metadata.src_node_id, -1)
        vector = wire.masked_numbers(reply.content, dtype.name, size)
        self.bytes_up += vector.nbytes
        try:
            self._sum.take_numbers(at, np.asarray(vector), dtype, size)
        except PrivacyError as error:
            raise SessionError(str(error)) from None
        self.seconds += time.perf_counter() - began

    def close(self) -> Summed:
        """Take the masks off the sum.

        Raises:
            PrivacyError: too few owners are in it, or are left to take them off; the round's
                numbers are lost, and nobody learns them.
        """
        sum_ = self._sum
        if sum_ is None or self.failure:
            raise PrivacyError(f"masked sum: {self.failure or 'there is none in this round'}")
        sum_.check_enough(self._config.secure.min_owners)
        nodes = {n: at for n, at in self._places.items() if at in sum_.survivors}
        survivors = {"survivors": wire.pack_places(sorted(sum_.survivors))}
        for node, values in self._ask(wire.CONFIRM, dict.fromkeys(nodes, survivors)).items():
            with self._losing(node):
                signature = wire.bytes_of(values, "signature", wire.SIGNATURE_BYTES)
                sum_.take_confirmation(nodes[node], signature)
        nodes = {n: at for n, at in nodes.items() if at in sum_.confirmed}
        asked = {n: wire.pack_table(sum_.signatures_for(at)) for n, at in nodes.items()}
        for node, values in self._ask(wire.REVEAL, asked).items():
            with self._losing(node):
                reveals = {
                    at: (kind, share)
                    for kind in (OWN, KEY)
                    for at, share in wire.table_of(values, wire.SHARE_BYTES, kind).items()
                }
                sum_.take_reveals(nodes[node], reveals)
        began = time.perf_counter()
        quantiser = quantiser_of(self._config, len(sum_.adverts))
        found = self._numbers.decode(quantiser, sum_.total(), len(sum_.survivors))
        self.seconds += time.perf_counter() - began
        return found

    def facts(self, summed: Summed | None) -> dict[str, Any]:
        """Return what is written down of the sum, JSON-able."""
        sum_ = self._sum
        found: dict[str, Any] = {
            "roster": 0 if sum_ is None else len(sum_.adverts),
            "neighbours": 0 if sum_ is None else sum_.roster.degree,
            "threshold": 0 if sum_ is None else sum_.roster.threshold,
            "in_sum": 0 if sum_ is None else len(sum_.survivors),
            "seconds": self.seconds,
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
        }
        return found if summed is None else {**found, "error": summed.error}

    # ---- the parts --------------------------------------------------------------------------

    def _ask(self, phase: str, asked: Mapping[int, Mapping[str, Any]]) -> dict[int, wire.Values]:
        """Send one phase's messages; return the answers, and lose whoever gives none."""
        messages = []
        for node, values in asked.items():
            content = self._offer(node)
            content[wire.SECURE] = wire.secure_record(phase, **values)
            self.bytes_down += _size(values)
            messages.append(Message(content, dst_node_id=node, message_type=SECURE_TYPE))
        sent = [message.metadata for message in messages]
        found: dict[int, wire.Values] = {}
        waits = self._config.session.idle_s
        for reply in self._grid.send_and_receive(messages, timeout=waits):
            node = node_of(reply, sent)
            if reply.has_error():
                self._lose(node, reason_of(reply))
                continue
            with self._losing(node):
                found[node] = wire.read_record(reply.content, phase)
                self.bytes_up += _size(found[node])
        for node in asked.keys() - found.keys():
            report = self._context.report
            told = f"masked sum: no answer to {phase} within session.idle-s"
            report.lose_silent(node, self._clients.names.get(node), told)
        self._context.messages += 2 * len(messages)
        return {node: found[node] for node in asked if node in found}

    def _losing(self, node: int) -> _Losing:
        return _Losing(lambda reason: self._lose(node, reason))

    def _lose(self, node: int, reason: str) -> None:
        log.warning("owner at node %d is lost to the masked sum: %s", node, reason)
        self._context.report.lose(node, self._clients.names.get(node), reason)

    def _fail(self, reason: str, nodes: list[int]) -> None:
        log.warning("round %d: masked sum: %s", self._context.number, reason)
        self.failure = reason
        self._keep(nodes)

    def _keep(self, nodes: list[int]) -> None:
        kept = set() if self.failure else set(nodes)
        waves = [[n for n in wave if n in kept] for wave in self._context.waves]
        self._context.waves = [wave for wave in waves if wave]


class _Losing:
    """Context that loses an owner to its error, and goes on with the others."""

    def __init__(self, lose: Callable[[str], None]) -> None:
        self._lose = lose

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, FedsplitError):
            self._lose(f"{type(error).__name__}: {error}")
            return True
        return False


def _size(values: Mapping[str, Any]) -> int:
    """Return the bytes of a record's values."""
    rows = [v if isinstance(v, list) else [v] for v in values.values()]
    return sum(len(x) for row in rows for x in row if isinstance(x, bytes))
