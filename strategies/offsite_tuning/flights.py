"""Owners at work while rounds go on: who began when, from what, and who is back first.

Buffered asynchronous aggregation (FedBuff, Nguyen et al., arXiv 2106.06639): a round ends with the
first ``buffer.size`` updates.  An update that began s rounds ago is a change from the weights of
that time; it is put on the present ones, scaled by ``(1 + s)^-buffer.staleness`` (section 5), and
then is judged, bounded and averaged as any other.  With a buffer of the whole cohort nobody is
late, and rounds are what they are without one, bit for bit.

In a simulation the order in which updates come is a function of the run's seed and the owners'
names: each owner has a speed, each of its turns a time, and the clock is a virtual one.  Elsewhere
it is the order of arrival.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Message, Metadata
from flwr.serverapp import Grid
from torch import Tensor

from fedsplit.config import BufferConfig
from fedsplit.seeding import derive_seed
from fedsplit.wire.messages import WEIGHTS, weights_record

from ..rounds.polling_grid import LEAST_S, MOST_S, SHARE, PollingGrid
from ..rounds.report import natural
from ..sessions.owner_keys import SIMULATION

JITTER = 0.25
"""Spread of one owner's turns, in units of the spread between owners."""


@dataclass
class Flight:
    """One owner's turn.

    Attributes:
        owner: its name.
        number: the round that asked for it.
        finish: when it is back, by the virtual clock.
        node: the owner's node; 0: it must be asked again, after a restart.
        asked: metadata of its message.
        message: that message's id.
        began: ``time.monotonic()`` when it was sent.
        reply: the answer, once it is there.
    """

    owner: str
    number: int
    finish: float
    node: int = 0
    asked: Metadata | None = None
    message: str = ""
    began: float = field(default_factory=time.monotonic)
    reply: Message | None = None


class Flights:
    """All turns under way.

    Args:
        config: the run's settings of the buffer.
        seed: of the run.

    Attributes:
        due: whether the next messages that are sent are a round's of training.
        staleness: owner -> rounds that its last update was late, of the round being closed.
        dropped: owners whose update was too stale, of the round being closed.
    """

    def __init__(self, config: BufferConfig, seed: int) -> None:
        self._config = config
        self._seed = seed
        self._virtual = os.environ.get(SIMULATION) == "1"
        self._clock = 0.0
        self._flights: list[Flight] = []
        self._versions: dict[int, dict[str, np.ndarray[Any, Any]]] = {}
        self._landed: list[Flight] = []
        self.due = False
        self.staleness: dict[str, int] = {}
        self.dropped: list[str] = []

    # ---- leaving ----------------------------------------------------------------------------

    @property
    def owners(self) -> set[str]:
        """The names of the owners at work."""
        return {flight.owner for flight in self._flights}

    def launch(self, node: int, owner: str, number: int, arrays: ArrayRecord) -> None:
        """Take note that an owner is asked to train in a round, from these weights."""
        finish = self._clock + self._duration(owner, number)
        self._flights.append(Flight(owner, number, finish, node))
        if number not in self._versions:
            self._versions[number] = {n: a.numpy().copy() for n, a in arrays.items()}

    def relaunch(self, nodes: Mapping[int, str]) -> list[Flight]:
        """Return the turns of an interrupted run, with the nodes that they are asked of again.

        Those whose owners are not connected are forgotten.
        """
        by_name = {name: node for node, name in nodes.items()}
        again = [flight for flight in self._flights if not flight.node]
        for flight in again:
            flight.node = by_name.get(flight.owner, 0)
        self._flights = [flight for flight in self._flights if flight.node]
        return [flight for flight in again if flight.node]

    def version(self, number: int) -> ArrayRecord:
        """Return what owners that began in a round began with."""
        return weights_record(self._versions[number])

    def sent(self, messages: Iterable[Message], ids: Iterable[str]) -> None:
        """Take note of the messages that were sent, and their ids; one without an id was not."""
        by_node = {flight.node: flight for flight in self._flights}
        for message, id_ in zip(messages, ids, strict=False):
            flight = by_node[message.metadata.dst_node_id]
            flight.asked, flight.message = message.metadata, id_ or ""
            flight.began = time.monotonic()

    def _duration(self, owner: str, number: int) -> float:
        def normal(*context: str | int) -> float:
            return random.Random(derive_seed(self._seed, "arrival", *context)).gauss(0.0, 1.0)

        spread = self._config.spread
        return math.exp(spread * (normal(owner) + JITTER * normal(owner, number)))

    # ---- coming back ------------------------------------------------------------------------

    @property
    def waiting(self) -> list[str]:
        """Ids of the messages without an answer."""
        return [f.message for f in self._flights if f.message and f.reply is None]

    def take(self, reply: Message) -> None:
        """Take an answer that came."""
        for flight in self._flights:
            if flight.message and flight.message == reply.metadata.reply_to_message_id:
                flight.reply = reply
                self._landed.append(flight)

    def land(self, late_s: float) -> list[Flight] | None:
        """Return the turns that end the round, or None while they are not all there.

        Args:
            late_s: seconds after which an owner's answer is not waited for any more.
        """
        now = time.monotonic()
        size = min(self._config.size, len(self._flights))
        if self._virtual:
            ranked = sorted(self._flights, key=lambda f: (f.finish, natural(f.owner)))
            first = ranked[:size]
        else:
            given_up = [f for f in self._flights if f.reply is None and self._over(f, now, late_s)]
            first = [*given_up, *self._landed][:size]
        if len(first) < size or not all(f.reply or self._over(f, now, late_s) for f in first):
            return None
        for flight in first:
            self._flights.remove(flight)
            self._clock = max(self._clock, flight.finish)
        self._landed = [flight for flight in self._landed if flight not in first]
        return first

    @staticmethod
    def _over(flight: Flight, now: float, late_s: float) -> bool:
        return not flight.message or now - flight.began > late_s

    def close(self, number: int, landed: Iterable[Flight]) -> list[Flight]:
        """Return the turns whose updates a round may use; the others' are dropped."""
        self.staleness, self.dropped, kept = {}, [], []
        for flight in landed:
            late = number - flight.number
            if late > self._config.most_stale:
                self.dropped.append(flight.owner)
            else:
                self.staleness[flight.owner] = late
                kept.append(flight)
        return kept

    def freshen(self, flight: Flight, number: int, reply: Message, arrays: ArrayRecord) -> None:
        """Put an owner's change on the present weights, scaled by its staleness.

        Args:
            flight: its turn.
            number: the round that uses it.
            reply: its reply, with checked weights; one that is not late stays as it is.
            arrays: the present weights.
        """
        late = number - flight.number
        if not late:
            return
        scale = (1.0 + late) ** -self._config.staleness
        began, sent = self._versions[flight.number], reply.content.array_records[WEIGHTS]
        moved = {}
        for name, array in arrays.items():
            change = sent[name].numpy().astype(np.float64) - began[name]
            moved[name] = (array.numpy() + scale * change).astype(np.float32)
        reply.content[WEIGHTS] = weights_record(moved)

    def forget(self) -> None:
        """Let go of weights that nobody at work began with."""
        used = {flight.number for flight in self._flights}
        self._versions = {n: v for n, v in self._versions.items() if n in used}

    def report(self) -> dict[str, Any]:
        """Return what is written down of a round."""
        return {
            "staleness": self.staleness,
            "dropped": self.dropped,
            "at_work": sorted((f.owner for f in self._flights), key=natural),
        }

    # ---- over restarts ----------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return (weights that owners at work began with, who is at work)."""
        tensors = {
            f"version.{number}.{name}": torch.from_numpy(value.copy())
            for number, values in self._versions.items()
            for name, value in values.items()
        }
        rows = [[f.owner, f.number, f.finish] for f in self._flights]
        return tensors, {"buffer": {"clock": self._clock, "flights": rows}}

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Go on from :meth:`state`: whoever was at work is asked again, from what it began with."""
        told = facts.get("buffer")
        if told is None:
            return
        self._clock = float(told["clock"])
        self._flights = [Flight(str(o), int(n), float(f)) for o, n, f in told["flights"]]
        self._versions = {}
        for key, tensor in tensors.items():
            if key.startswith("version."):
                _, number, name = key.split(".", 2)
                self._versions.setdefault(int(number), {})[name] = tensor.numpy().copy()


class BufferedGrid(PollingGrid):
    """A grid on which a round of training ends with the first updates.

    Args:
        grid: Flower's.
        flights: who is at work; decides when a round has ended.

    Attributes:
        flights: as given.
        landed: the turns that ended the last round of training.
    """

    def __init__(self, grid: Grid, flights: Flights) -> None:
        super().__init__(grid)
        self.flights = flights
        self.landed: list[Flight] = []

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Return the replies that end a round of training; all of them for other messages."""
        asked, flights = list(messages), self.flights
        if not flights.due:
            return super().send_and_receive(asked, timeout=timeout)
        flights.due = False
        flights.sent(asked, self.push_messages(asked))
        del messages, asked  # they carry weights
        late_s, began = math.inf if timeout is None else timeout, time.monotonic()
        while True:
            for reply in self.pull_messages(flights.waiting) if flights.waiting else ():
                flights.take(reply)
            landed = flights.land(late_s)
            if landed is not None:
                break
            waited = time.monotonic() - began
            self.wait_for_reply(min(MOST_S, max(LEAST_S, SHARE * waited)))
        self.landed = landed
        return [flight.reply for flight in landed if flight.reply is not None]
