"""A Flower grid that hands replies on as they come, and that need not wait for ever.

Flower's ``send_and_receive`` looks for replies every three seconds and returns them all together,
at the end.  A round would hear only then that an owner's app has failed, having waited for its
session until ``session.wave-wait-s``; and an app that hangs would hold the round for as long as the
strategy's timeout.  A grid within this process may have a method ``wait_for_reply(seconds)`` that
returns early when a reply comes; others are looked at ever less often.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flwr.app import Message, Metadata
from flwr.serverapp import Grid

log = logging.getLogger(__name__)

LEAST_S, MOST_S = 0.01, 3.0  # between two looks; Flower's own is 3
SHARE = 0.1  # of the time waited so far: a reply is found at most this much late


class PollingGrid(Grid):
    """Sends through another grid and looks for replies at once, then ever less often.

    Args:
        grid: Flower's.
        on_reply: called with (metadata of a message, its reply) when that comes, in the thread that
            waits.
        is_needed: whether the session of one of these nodes may still have something to do; None:
            always.
        patience_s: how long to wait on when it has not.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        on_reply: Callable[[Metadata, Message], None] | None = None,
        is_needed: Callable[[set[int]], bool] | None = None,
        patience_s: float = math.inf,
    ) -> None:
        self._grid = grid
        self._on_reply = on_reply
        self._is_needed = is_needed
        self._patience_s = patience_s

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Return the replies; without those of messages that could not be sent, or not awaited.

        Args:
            messages: each to its node.
            timeout: seconds at most; None: until all are there.
        """
        sent = list(messages)
        ids = list(self._grid.push_messages(sent))
        # Flower leaves None for a message that it could not send, and nothing where all were large.
        waiting = {i: m.metadata for i, m in zip(ids, sent, strict=False) if i}
        if len(waiting) < len(sent):
            log.warning("%d of %d messages could not be sent", len(sent) - len(waiting), len(sent))
        del messages, sent  # they carry weights
        began = needed = time.monotonic()
        replies: list[Message] = []
        while waiting:
            for reply in self._grid.pull_messages(list(waiting)):
                asked = waiting.pop(reply.metadata.reply_to_message_id, None)
                replies.append(reply)
                if self._on_reply is not None and asked is not None:
                    self._on_reply(asked, reply)
            now = time.monotonic()
            nodes = {asked.dst_node_id for asked in waiting.values()}
            if self._is_needed is None or self._is_needed(nodes):
                needed = now
            left = min(needed + self._patience_s, math.inf if timeout is None else began + timeout)
            if not waiting or now >= left:
                break
            self.wait_for_reply(min(MOST_S, max(LEAST_S, SHARE * (now - began)), left - now))
        if waiting:
            log.warning("no reply from %d nodes: %s", len(nodes), sorted(nodes)[:8])
        return replies

    def wait_for_reply(self, seconds: float) -> None:
        """Sleep so long, or until a reply comes where the grid below can tell."""
        wait = getattr(self._grid, "wait_for_reply", time.sleep)
        wait(seconds)

    # ---- as the grid below --------------------------------------------------------------------

    @property
    def run(self) -> Any:
        """Return the run that the grid belongs to."""
        return self._grid.run

    def set_run(self, run: Any) -> None:
        """Tell the grid its run."""
        self._grid.set_run(run)

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Make a message as the grid does."""
        return self._grid.create_message(*args, **kwargs)

    @property
    def owner_names(self) -> Mapping[int, str]:
        """Return the names of the nodes' owners, as far as the grid below knows them itself."""
        known: Mapping[int, str] = getattr(self._grid, "owner_names", {})
        return known

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes that are connected."""
        return self._grid.get_node_ids()

    def get_nodes(self) -> Any:
        """Return what is known of the nodes that are connected."""
        return self._grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send, without waiting."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to these that are there."""
        return self._grid.pull_messages(message_ids)
