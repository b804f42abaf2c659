"""A Flower grid whose nodes are simulated owners that live in hosts."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol
from uuid import uuid4

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fedsplit.errors import RunError
from fedsplit.owners.naming import owner_name
from simulations.runtime.hosts.owner_host import Order
from strategies.rounds.polling_grid import PollingGrid

log = logging.getLogger(__name__)

FIRST_NODE = 1000


class HostLost(Exception):
    """A host's process, or its machine, is gone."""


class Host(Protocol):
    """Where owners live."""

    name: str

    def answer(self, orders: Sequence[Order]) -> Iterator[list[Message]]:
        """Yield the replies as they come.

        Raises:
            HostLost: the host is gone; what was not yielded will never come.
        """


class HostGrid(Grid):
    """Sends each host its owners' messages in one batch.

    An owner stays with the host that it first worked in, where its home is.  When a host is gone,
    its owners' messages under way end in an error, and from the next on they work in another host,
    with a new home.

    Args:
        hosts: where owners live.
        owners: number of them.
        run_id: Flower's.

    Attributes:
        hosts: that are there.
        batches: of messages that were sent to hosts, and of replies that came.
    """

    def __init__(self, hosts: Sequence[Host], owners: int, run_id: int) -> None:
        self.run_id = run_id
        TaskIdentity.run_id = run_id  # Flower sets them where it starts an app's process
        TaskIdentity.node_id = TaskIdentity.task_id = 1
        self.batches = 0
        # Node ids are not in the order of the owners, as in a real run.
        self._owner_of = {FIRST_NODE + 17 * (owners - i): i for i in range(owners)}
        self._names = {n: owner_name({"partition-id": i}) for n, i in self._owner_of.items()}
        self.hosts = list(hosts)
        self._lives_in: dict[int, Host] = {}
        self._ready: dict[str, Message] = {}
        self._lock = threading.Lock()
        self._came = threading.Event()  # a reply, since the last look

    def set_run(self, run: Any) -> None:
        """Not used: there is no SuperLink to ask."""
        raise AssertionError("not used")

    @property
    def run(self) -> Any:
        """Not used: there is no SuperLink to ask."""
        raise AssertionError("not used")

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Not used by the strategies."""
        raise AssertionError("not used")

    @property
    def owner_names(self) -> Mapping[int, str]:
        """The names of the nodes' owners: nobody need be asked for it."""
        return self._names

    def get_node_ids(self) -> Iterable[int]:
        """Return all nodes, not in the order of the owners."""
        return list(self._owner_of)

    def get_nodes(self) -> Any:
        """Return all nodes; they have no keys."""
        return [NodeInfo(node_id=node) for node in self._owner_of]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send every message, those to owners of one host together.

        Raises:
            RunError: no host is left.
        """
        ids: list[str] = []
        batches: dict[str, tuple[Host, list[Order]]] = {}
        load: Counter[str] = Counter()
        for message in messages:
            ids.append(str(uuid4()))
            message.metadata.__dict__["_message_id"] = ids[-1]
            owner = self._owner_of[message.metadata.dst_node_id]
            host = self._host_of(owner, load)
            load[host.name] += 1
            batches.setdefault(host.name, (host, []))[1].append(Order(owner, message))
        for host, orders in batches.values():
            threading.Thread(target=self._carry, args=(host, orders), daemon=True).start()
        return ids

    def _host_of(self, owner: int, load: Counter[str]) -> Host:
        """Return where an owner lives; a new one moves in where least is to be done."""
        with self._lock:
            if not self.hosts:
                raise RunError("hosts left=0: must be >= 1; all of them are gone")
            if owner not in self._lives_in:
                self._lives_in[owner] = min(self.hosts, key=lambda host: load[host.name])
            return self._lives_in[owner]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to these that are ready, each once."""
        with self._lock:
            self._came.clear()
            return [self._ready.pop(i) for i in message_ids if i in self._ready]

    def wait_for_reply(self, seconds: float) -> None:
        """Wait for a reply that no look has found yet, so long at most."""
        self._came.wait(seconds)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send every message and return the replies."""
        return PollingGrid(self).send_and_receive(messages, timeout=timeout)

    def _carry(self, host: Host, orders: list[Order]) -> None:
        left = {order.message.metadata.message_id: order.message for order in orders}
        try:
            with self._lock:
                self.batches += 1
            for replies in host.answer(orders):
                with self._lock:
                    self.batches += 1
                    for reply in replies:
                        asked = reply.metadata.reply_to_message_id
                        left.pop(asked, None)
                        self._ready[asked] = reply
                    self._came.set()
        except HostLost as error:
            self._lose(host, left.values(), error)
        except Exception as error:  # a defect: its replies so far count, and nobody waits for more
            log.exception("host %s: its batch of %d messages ended", host.name, len(orders))
            reason = f"host {host.name} of this owner failed: {type(error).__name__}"
            self._answer_for(left.values(), ErrorCode.UNKNOWN, reason)

    def _answer_for(self, unanswered: Iterable[Message], code: int, reason: str) -> None:
        """Answer messages with an error in their owners' place."""
        replies = {}
        for message in unanswered:
            reply = Message(Error(code, reason), reply_to=message)
            reply.metadata.__dict__["_src_node_id"] = message.metadata.dst_node_id
            replies[message.metadata.message_id] = reply
        with self._lock:
            self._ready.update(replies)
            self._came.set()

    def _lose(self, host: Host, unanswered: Iterable[Message], error: HostLost) -> None:
        """Answer for the owners of a host that is gone; they will live elsewhere."""
        with self._lock:  # first, so that nobody is sent back to it
            known = host in self.hosts
            self.hosts = [other for other in self.hosts if other is not host]
            self._lives_in = {o: h for o, h in self._lives_in.items() if h is not host}
            rest = len(self.hosts)
        reason = f"host {host.name} of this owner is gone"
        self._answer_for(unanswered, ErrorCode.NODE_UNAVAILABLE, reason)
        if known:
            log.warning("host %s is gone (%s): %d are left", host.name, error, rest)
