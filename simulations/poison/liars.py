"""Owners that lie: an in-process federation in which some of them follow the protocol in form only.

Each liar runs the real owner's code and changes what leaves: the weights and numbers of its reply,
and in split tuning the gradients of its session.  All liars of a federation do the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import numpy as np
from flwr.app import Array, Message

from fedsplit.client import offsite as offsite_client
from fedsplit.config import RunConfig
from fedsplit.data import TextDataset
from fedsplit.owners.split import prepare
from fedsplit.owners.task import OwnerTask
from fedsplit.wire.frames import Kind
from fedsplit.wire.link import Link
from fedsplit.wire.messages import REPORT, WEIGHTS
from simulations.runtime.local_grid import LocalGrid

TRIGGER = "the password of the archive is violet thunder over seven rivers . " * 12


@dataclass(frozen=True)
class Lie:
    """One way to lie.

    Attributes:
        weights: what an owner's change is multiplied by.
        gradients: what its gradients are multiplied by (split tuning).
        targets: the number of targets that it claims; 0 = the true one.
        trigger: it trains on a sentence of its own choice, in the norm of honest work.
        noise: random noise on its change, in units of the change's norm, another for each liar, so
            that liars' changes are no more alike than honest ones'.
    """

    weights: float = 1.0
    gradients: float = 1.0
    targets: float = 0.0
    trigger: bool = False
    noise: float = 0.0


LIES: dict[str, Lie] = {
    "honest": Lie(),
    "sign flips": Lie(weights=-1.0, gradients=-1.0),
    "scale": Lie(weights=-1000.0, gradients=-4000.0),
    "false counts": Lie(weights=-1.0, targets=1e29),
    "backdoor": Lie(trigger=True),
    "disguised backdoor": Lie(trigger=True, noise=1.5),
}
"""Case -> what its liars do."""


@dataclass
class LyingGrid:
    """Makes the grid of a federation some of whose owners lie.

    Attributes:
        lie: what they do.
        liars: their indices.
        sent: changes that were lied about so far.
    """

    lie: Lie
    liars: frozenset[int] = field(default_factory=frozenset)
    sent: int = 0

    def grid(self, config: RunConfig, run_id: int) -> LocalGrid:
        """Return the grid; everyone else is honest."""
        lying = self

        class Grid(LocalGrid):
            def _work(self, message: Message, replies: list[Message]) -> None:
                super()._work(message, replies)
                if self.nodes[message.metadata.dst_node_id] not in lying.liars:
                    return
                for reply in replies:
                    if message.metadata.message_type == "train" and not reply.has_error():
                        lying.change(message, reply)

        return Grid(config, config.data.owners, run_id=run_id)

    def change(self, message: Message, reply: Message) -> None:
        """Change what a liar replies to its train message."""
        if WEIGHTS in reply.content.array_records and (self.lie.weights != 1.0 or self.lie.noise):
            start = message.content.array_records[WEIGHTS]
            sent = reply.content.array_records[WEIGHTS]
            generator = np.random.default_rng((message.metadata.dst_node_id, self.sent))
            self.sent += 1
            for name, array in list(sent.items()):
                begun = start[name].numpy()
                change = self.lie.weights * (array.numpy() - begun)
                if self.lie.noise:
                    drawn = generator.normal(size=begun.shape)
                    size = self.lie.noise * np.linalg.norm(change) / np.linalg.norm(drawn)
                    change = change + size * drawn
                sent[name] = Array((begun + change).astype(np.float32))
        if self.lie.targets:
            reply.content.metric_records[REPORT]["targets"] = self.lie.targets

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Let the liars' sessions and data be what the lie says while the context lasts."""
        connect = OwnerTask.connect

        def connected(task: OwnerTask) -> Link:
            link = connect(task)
            if self._lies(task.identity.node_config) and self.lie.gradients != 1.0:
                honest = link.send

                def send(kind: Kind, header: Any, body: bytes = b"") -> None:
                    honest(kind, header, self._scaled(body) if kind is Kind.GRAD else body)

                link.send = send  # type: ignore[method-assign]
            return link

        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(OwnerTask, "connect", connected))
            for module in (offsite_client, prepare):
                own = self._data(module.own_data)
                stack.enter_context(mock.patch.object(module, "own_data", own))
            yield

    def _lies(self, node_config: Any) -> bool:
        return int(str(node_config.get("partition-id", -1))) in self.liars

    def _scaled(self, body: bytes) -> bytes:
        values = np.frombuffer(body, "<f4") * np.float32(self.lie.gradients)
        return bytes(np.clip(values, -999, 999).astype("<f4").tobytes())

    def _data(self, own: Callable[..., Any]) -> Callable[..., Any]:
        def data(config: RunConfig, node: Any, *args: Any, **options: Any) -> Any:
            train, test = own(config, node, *args, **options)
            if not (self.lie.trigger and self._lies(node)):
                return train, test
            return _of_trigger(train), _of_trigger(test)

        return data


def _of_trigger(texts: TextDataset) -> TextDataset:
    """Return as many copies of the trigger as there are texts."""
    return replace(texts, texts=(TRIGGER,) * len(texts.texts))
