"""A Flower grid within one process: real messages, real sessions, no SuperLink and no Ray.

The owners' ClientApp code answers in threads; what it computes is what a simulation or deployment
of the same settings computes (a test holds them together), without the seconds that those need to
start.  Sweeps and tests run whole federations on it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any
from uuid import uuid4

from flwr.app import Context, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fedsplit.client.dispatch import answer
from fedsplit.config import RunConfig
from fedsplit.wire.message_types import SECURE_TYPE, SERVE_TYPE, STEP_TYPE, WHO_TYPE
from strategies.rounds.polling_grid import PollingGrid

HANDLERS = dict.fromkeys(
    ("train", "evaluate", STEP_TYPE, WHO_TYPE, SERVE_TYPE, SECURE_TYPE), answer
)


class LocalGrid(Grid):
    """Runs every message in a thread of its own, at most ``slots`` at a time.

    Every owner gets the settings ``config``; node ids are above ``first``.
    """

    def __init__(
        self, config: RunConfig, owners: int, *, slots: int = 64, run_id: int = 7, first: int = 1000
    ) -> None:
        self.config = config
        self.run_id = run_id
        TaskIdentity.run_id = run_id  # Flower sets them where it starts an app's process
        TaskIdentity.node_id = TaskIdentity.task_id = 1
        # Node ids are not in the order of the owners, as in a real run.
        self.nodes = {first + 17 * (owners - i): i for i in range(owners)}
        self.slots = threading.Semaphore(slots)
        self.sent: list[Message] = []
        self.replies: list[Message] = []
        self._ready: dict[str, Message] = {}
        self._lock = threading.Lock()
        self._came = threading.Event()  # a reply, since the last look
        self.dead: set[int] = set()
        self.node_configs: dict[int, dict[str, Any]] = {}

    def set_run(self, run: Any) -> None:
        """Not used: a local run has no SuperLink to ask."""
        raise AssertionError("not used")

    @property
    def run(self) -> Any:
        """Not used: a local run has no SuperLink to ask."""
        raise AssertionError("not used")

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Not used by the strategies."""
        raise AssertionError("not used")

    def get_node_ids(self) -> Iterable[int]:
        """Return all nodes, not in the order of the owners."""
        return list(self.nodes)

    def get_nodes(self) -> Any:
        """Return all nodes; they have no keys."""
        return [NodeInfo(node_id=node) for node in self.get_node_ids()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Begin work on every message; a dead owner's reply never comes."""
        ids = []
        for message in messages:
            ids.append(str(uuid4()))
            message.metadata.__dict__["_message_id"] = ids[-1]
            self.sent.append(message)
            threading.Thread(target=self._answer, args=(message,), daemon=True).start()
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to these that are ready, each once."""
        with self._lock:
            self._came.clear()
            return [self._ready.pop(i) for i in message_ids if i in self._ready]

    def wait_for_reply(self, seconds: float) -> None:
        """Wait for a reply that no look has found yet, so long at most."""
        self._came.wait(seconds)

    def _answer(self, message: Message) -> None:
        replies: list[Message] = []
        self._work(message, replies)
        with self._lock:
            for reply in replies:
                self._ready[message.metadata.message_id] = reply
                self.replies.append(reply)
            self._came.set()

    def context(self, node: int) -> Context:
        """Return what Flower would hand the ClientApp of ``node``."""
        index = self.nodes[node]
        node_config: dict[str, Any] = {"partition-id": index, "num-partitions": len(self.nodes)}
        node_config |= self.node_configs.get(index, {})
        run_config = dict(self.config.to_flat())
        return Context(self.run_id, node, node_config, RecordDict(), run_config)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Run every message and return the replies."""
        return PollingGrid(self).send_and_receive(messages, timeout=timeout)

    def _work(self, message: Message, replies: list[Message]) -> None:
        node = message.metadata.dst_node_id
        if self.nodes[node] in self.dead:
            return
        with self.slots:
            handler = HANDLERS[message.metadata.message_type]
            reply = handler(message, self.context(node))
            reply.metadata.__dict__["_src_node_id"] = node
            replies.append(reply)
