"""A session carried by Flower messages: every message may meet a new process.

The session's whole state is in the owner's run folder between messages; what a process still has in
memory is used only if it is the very state that the last message left.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from fedsplit import storage
from fedsplit.config import RunConfig
from fedsplit.errors import SessionError
from fedsplit.owners.home import OwnerHome
from fedsplit.owners.ledger.disclosure import Outbox
from fedsplit.owners.split.owner import SplitOwner
from fedsplit.owners.split.prepare import load_joint_state, save_joint_state
from fedsplit.owners.split.session import hello, keep_bundle
from fedsplit.wire.frames import Kind
from fedsplit.wire.link import Link
from fedsplit.wire.messages import SessionOffer
from fedsplit.wire.transfer import receive_files

_DEPTH = 1 << 16


@dataclass
class _Live:
    exchange: int
    link: Link
    phase: str
    owner: SplitOwner | None


# Sessions this process served last; a cache, checked against the exchange number on disk.
_LIVE: dict[tuple[int, int, int, str], _Live] = {}


class MessageSession:
    """Answers the messages of one session, one at a time.

    Args:
        offer: the message's offer.
        config: the run's settings.
        outbox: checks and records every frame before it is sent.
        home: the owner's folder.
        prepare: digest -> ready owner.
        job: folder of what outlives a restart of the server; None: the run's own.
    """

    def __init__(
        self,
        offer: SessionOffer,
        config: RunConfig,
        outbox: Outbox,
        home: OwnerHome,
        prepare: Callable[[str], SplitOwner],
        job: Path | None = None,
    ) -> None:
        self._offer = offer
        self._config = config
        self._outbox = outbox
        self._home = home
        self._prepare = prepare
        self._folder = home.run_dir(offer.run, offer.node)
        self._job = job or self._folder
        self._key = (offer.run, offer.node, offer.round, offer.mode)

    @property
    def _path(self) -> Path:
        return self._folder / f"session-{self._offer.mode}.json"

    def answer(self, frames: list[bytes]) -> list[bytes]:
        """Take the server's frames and return this owner's.

        Raises:
            SessionError: the message is not the next one of the session.
            FedsplitError: whatever the frames or the owner's own data did wrong.
        """
        live = self._restore()
        link = live.link
        for frame in frames:
            link.inbox.put_nowait(frame)
        if live.exchange == 0:
            self._outbox.send(link, Kind.HELLO, hello(self._offer, self._outbox.trip.owner))
            welcome = link.expect(Kind.WELCOME, 1.0)
            if welcome["bottom"] != self._offer.bottom:
                raise SessionError("server's bottom: must be the announced one")
            if self._home.bottom_dir(self._offer.bottom).exists():
                self._begin(live)
            else:
                self._outbox.send(link, Kind.NEED, {"bottom": self._offer.bottom})
                live.phase = "files"
        elif live.phase == "files":
            keep_bundle(receive_files(link, 1.0), self._offer.bottom, self._home)
            self._begin(live)
        else:
            assert live.owner is not None
            while not link.inbox.empty():
                for outgoing in live.owner.handle(link.recv(1.0)):
                    self._outbox.send(link, *outgoing)
        answer = link.drain()
        live.exchange += 1
        self._keep(live)
        return answer

    def _begin(self, live: _Live) -> None:
        live.owner = self._prepare(self._offer.bottom)
        live.phase = "run"
        self._outbox.attach(live.owner)
        self._outbox.send(live.link, *live.owner.ready())

    def _restore(self) -> _Live:
        if self._offer.exchange == 0:
            return _Live(0, self._new_link(), "new", None)
        stored = self._stored()
        live = _LIVE.get(self._key)
        if live is not None and live.exchange == stored["exchange"]:
            if live.owner is not None:
                self._outbox.attach(live.owner)
            return live
        link = self._new_link()
        link.counters = (int(stored["sent"]), int(stored["received"]))
        live = _Live(int(stored["exchange"]), link, str(stored["phase"]), None)
        if live.phase == "run":
            live.owner = self._prepare(self._offer.bottom)
            live.owner.load_state(stored["owner"])
            weights = self._folder / "joint.safetensors"
            if live.owner.optimizer is not None and stored["weights"]:
                live.owner.load_weights(load_file(weights))
                load_joint_state(live.owner, self._job, self._offer.round + 1)
            self._outbox.attach(live.owner)
        return live

    def _stored(self) -> dict[str, Any]:
        try:
            stored = json.loads(self._path.read_text())
        except (OSError, ValueError):
            stored = {}
        expected = {
            "round": self._offer.round,
            "exchange": self._offer.exchange,
            "mode": self._offer.mode,
        }
        found = {key: stored.get(key) for key in expected}
        if found != expected:
            raise SessionError(f"message {expected}: this owner's session is at {found}")
        return dict(stored)

    def _keep(self, live: _Live) -> None:
        learns = live.owner is not None and live.owner.optimizer is not None
        if learns:
            assert live.owner is not None
            path = self._folder / "joint.safetensors"
            storage.write_tensors(path, live.owner.weights(), durable=False)
            save_joint_state(live.owner, self._job, self._offer.round)
        sent, received = live.link.counters
        state = {
            "round": self._offer.round,
            "mode": self._offer.mode,
            "exchange": live.exchange,
            "phase": live.phase,
            "sent": sent,
            "received": received,
            "owner": live.owner.state() if live.owner else None,
            "metrics": live.owner.metrics() if live.owner else None,
            "done": bool(live.owner and live.owner.done),
            "weights": learns,
        }
        storage.write(self._path, json.dumps(state), durable=False)
        _LIVE.clear()  # one session per node is under way; older ones only cost memory
        _LIVE[self._key] = live

    def close(self) -> dict[str, float | int]:
        """Return the metrics of the finished session.

        Raises:
            SessionError: if it is not finished.
        """
        stored = self._stored()
        if not stored["done"]:
            raise SessionError("server closed the session before its last step")
        return dict(stored["metrics"])

    def weights(self) -> dict[str, Any]:
        """Return what the owner trained after :meth:`close`; empty where it trains nothing."""
        if not self._stored()["weights"]:
            return {}
        return dict(load_file(self._folder / "joint.safetensors"))

    def _new_link(self) -> Link:
        return Link(self._config.session.max_frame_mb << 20, depth=_DEPTH)
