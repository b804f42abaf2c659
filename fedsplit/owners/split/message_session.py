"""A session carried by Flower messages: every message may meet a new process.

The session's whole state is in the owner's run folder between messages; what a process still has in
memory is used only if it is the very state that the last message left.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from fedsplit import storage
from fedsplit.errors import SessionError
from fedsplit.owners.handshake import greet, request_files
from fedsplit.owners.ledger.disclosure import Averages
from fedsplit.owners.split.owner import SplitOwner
from fedsplit.owners.split.run_state import RunState
from fedsplit.owners.split.session import store_bottom
from fedsplit.owners.task import OwnerTask
from fedsplit.wire.link import Link
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
        task: what was agreed to.
        state: the run's files.
        build: makes the owner's side; called once the bottom is on disk.
    """

    def __init__(self, task: OwnerTask, state: RunState, build: Callable[[], SplitOwner]) -> None:
        self._task = task
        self._offer = task.offer
        self._check = task.check
        self._state = state
        self._build = build
        self._folder = state.folder
        self._key = (self._offer.run, self._offer.node, self._offer.round, self._offer.mode)

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
            link.incoming.put_nowait(frame)
        if live.exchange == 0:
            greet(link, self._offer, self._check, 1.0)
            if self._task.bottom_folder.exists():
                self._get_ready(live)
            else:
                request_files(link, self._offer, self._check)
                live.phase = "files"
        elif live.phase == "files":
            store_bottom(receive_files(link, 1.0), self._task)
            self._get_ready(live)
        else:
            assert live.owner is not None
            while not link.incoming.empty():
                for outgoing in live.owner.handle(link.recv(1.0)):
                    self._check.send(link, outgoing)
        answer = link.drain()
        live.exchange += 1
        self._save(live)
        return answer

    def _get_ready(self, live: _Live) -> None:
        live.owner = self._build()
        live.phase = "run"
        self._check.send(live.link, live.owner.ready())

    def _restore(self) -> _Live:
        if self._offer.exchange == 0:
            return _Live(0, self._new_link(), "new", None)
        stored = self._stored()
        live = _LIVE.get(self._key)
        if live is not None and live.exchange == stored["exchange"]:
            return live
        link = self._new_link()
        link.counters = (int(stored["sent"]), int(stored["received"]))
        live = _Live(int(stored["exchange"]), link, str(stored["phase"]), None)
        if live.phase == "run":
            live.owner = self._build()
            live.owner.load_state(stored["owner"])
            if live.owner.optimizer is not None and stored["weights"]:
                live.owner.load_weights(load_file(self._weights_path))
                self._state.load_optimizer(live.owner.optimizer, self._offer.round + 1)
        return live

    def _stored(self) -> dict[str, Any]:
        try:
            stored = json.loads(self._path.read_text(encoding="utf-8"))
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

    def _save(self, live: _Live) -> None:
        owner = live.owner
        learns = owner is not None and owner.optimizer is not None
        if owner is not None and learns:
            storage.write_tensors(self._weights_path, owner.weights(), durable=False)
            self._state.save_optimizer(owner.optimizer, self._offer.round)
        sent, received = live.link.counters
        state = {
            "round": self._offer.round,
            "mode": self._offer.mode,
            "exchange": live.exchange,
            "phase": live.phase,
            "sent": sent,
            "received": received,
            "owner": owner.state() if owner else None,
            "averages": asdict(owner.averages()) if owner else None,
            "done": bool(owner and owner.done),
            "weights": learns,
        }
        storage.write(self._path, json.dumps(state), durable=False)
        _LIVE.clear()  # one session per node is under way; older ones only cost memory
        _LIVE[self._key] = live

    @property
    def _weights_path(self) -> Path:
        return self._folder / "joint.safetensors"

    def close(self) -> Averages:
        """Return the averages of the finished session.

        Raises:
            SessionError: if it is not finished.
        """
        stored = self._stored()
        if not stored["done"]:
            raise SessionError("server closed the session before its last step")
        return Averages(**stored["averages"])

    def weights(self) -> dict[str, Any]:
        """Return what the owner trained after :meth:`close`; empty where it trains nothing."""
        if not self._stored()["weights"]:
            return {}
        return dict(load_file(self._weights_path))

    def _new_link(self) -> Link:
        return Link(self._task.config.session.max_frame_mb << 20, depth=_DEPTH)
