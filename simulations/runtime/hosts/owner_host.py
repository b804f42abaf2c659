"""One process that works for many simulated owners."""

from __future__ import annotations

import os
import queue
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.supercore.task_identity import TaskIdentity

from fedsplit import storage
from fedsplit.client.dispatch import answer
from fedsplit.config import RunConfig
from fedsplit.emulators.files import folder_digest
from fedsplit.errors import RunError
from fedsplit.owners.data_source import Shares, keep_shares, share_key
from fedsplit.owners.naming import SHARED_VARIABLE
from simulations.runtime.ledgers import sent_by_owners

GATHER_S = 0.02  # replies that come within it travel together


@dataclass(frozen=True)
class Order:
    """A message that is to be answered.

    Attributes:
        owner: index of the owner.
        message: the server's.
    """

    owner: int
    message: Message


@dataclass(frozen=True)
class HostSettings:
    """What a host is told once.

    Attributes:
        config: of the run.
        run_id: Flower's.
        slots: owners that it works for at the same time.
    """

    config: RunConfig
    run_id: int
    slots: int


class OwnerHost:
    """Answers messages for any number of owners, each in a thread while it lasts.

    The owners' code is the ClientApp's, message by message, with a context of the owner's own; what
    its process shares among them is what is the same for all: received files by their digest, the
    data that their shares are rows of.

    Args:
        settings: of the run.
        homes: folder of the owners' homes.
        shares: the owners' data, which another process has read; None: read here when asked for.
    """

    def __init__(self, settings: HostSettings, homes: Path, shares: Shares | None = None) -> None:
        self._settings = settings
        self._homes = homes
        TaskIdentity.run_id = settings.run_id  # Flower sets them where it starts an app's process
        TaskIdentity.node_id = TaskIdentity.task_id = 1
        self._flat = dict(settings.config.to_flat())
        if shares is not None:
            keep_shares(share_key(settings.config), shares)
        torch.set_num_threads(settings.config.output.owner_threads)
        self._threads = ThreadPoolExecutor(settings.slots, thread_name_prefix="owner")

    def keep(self, kind: str, digest: str, files: dict[str, bytes]) -> None:
        """Keep what the server hands out, as an owner that fetched it would.

        Raises:
            RunError: the files are not those of the digest.
        """
        folder = Path(os.environ[SHARED_VARIABLE]) / kind / digest
        if folder.exists():
            return
        folder.parent.mkdir(parents=True, exist_ok=True, mode=storage.PRIVATE_FOLDER)
        try:
            with storage.new_folder(folder, concurrent=True) as draft:
                for name, content in files.items():
                    (draft / name).write_bytes(content)
                if (found := folder_digest(draft)) != digest:
                    raise RunError(f"{kind} handed out have digest {found}: must be {digest}")
        except OSError:
            if not folder.exists():  # else another host of this machine was faster
                raise

    def answer(self, orders: Sequence[Order]) -> Iterator[list[Message]]:
        """Yield the replies, those that are ready together in one list."""
        done: queue.SimpleQueue[Message] = queue.SimpleQueue()
        for order in orders:
            self._threads.submit(self._work, order, done)
        left = len(orders)
        while left:
            replies = [done.get()]
            try:
                while len(replies) < left:
                    replies.append(done.get(timeout=GATHER_S))
            except queue.Empty:
                pass
            left -= len(replies)
            yield replies

    def _work(self, order: Order, done: queue.SimpleQueue[Message]) -> None:
        try:
            reply = answer(order.message, self.context(order))
        except Exception as error:  # or whoever waits for all replies would wait for ever
            name = type(error).__name__
            told = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, name)
            reply = Message(told, reply_to=order.message)
        node = order.message.metadata.dst_node_id
        reply.metadata.__dict__["_src_node_id"] = node
        done.put(reply)

    def context(self, order: Order) -> Context:
        """Return what Flower would hand the owner's ClientApp."""
        node = order.message.metadata.dst_node_id
        owners = self._settings.config.data.owners
        own: dict[str, Any] = {"partition-id": order.owner, "num-partitions": owners}
        return Context(self._settings.run_id, node, own, RecordDict(), dict(self._flat))

    def sent(self) -> list[dict[str, Any]]:
        """Return what the owners' ledgers here say they sent."""
        return sent_by_owners(self._homes)

    def close(self) -> None:
        """Let the threads go."""
        self._threads.shutdown(wait=False, cancel_futures=True)
