"""Owners that misbehave: whatever one of them sends on its stream is changed on the way out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from fedsplit.owners.task import OwnerTask
from fedsplit.wire.frames import Frame, Kind, encode
from fedsplit.wire.link import Link

MAX_BYTES = 1 << 30


class Outgoing:
    """One frame on its way out.

    Attributes:
        link: the owner's end of the stream.
        round: server round.
        kind: of the frame.
        header: a copy that may be changed.
        body: may be changed.
        sequence: that the link would give it.
    """

    def __init__(
        self, link: Link, round_: int, kind: Kind, header: dict[str, Any], body: bytes
    ) -> None:
        self.link, self.round, self.kind, self.header, self.body = link, round_, kind, header, body
        self.sequence = link.counters[0]

    def at(self, kind: Kind, step: int = 0) -> bool:
        """Whether it is that frame of that step."""
        return self.kind is kind and self.header.get("step", step) == step

    def send(self, sequence: int | None = None) -> None:
        """Send it as it is now, past the checks that an honest owner's link makes."""
        number = self.sequence if sequence is None else sequence
        data = encode(Frame(self.kind, self.header, self.body), number, MAX_BYTES)
        self.link.put(self.link.outgoing, data)
        self.link.counters = (self.link.counters[0] + 1, self.link.counters[1])


Tamper = Callable[[Outgoing], bool | None]


def tamper_with(
    monkeypatch: pytest.MonkeyPatch, tampers: dict[int, Tamper], *, frame_mb: int | None = None
) -> None:
    """Let ``tampers[partition]`` see each frame that owner sends; True = it has dealt with it.

    Args:
        monkeypatch: undoes it.
        tampers: partition id -> what happens to its frames.
        frame_mb: bound that the misbehaving owners put on their own frames.
    """
    connect = OwnerTask.connect

    def opened(task: OwnerTask) -> Link:
        tamper = tampers.get(int(str(task.identity.node_config["partition-id"])))
        if tamper is None:
            return connect(task)
        if frame_mb is not None:
            session = replace(task.config.session, max_frame_mb=frame_mb)
            task = replace(task, config=replace(task.config, session=session))
        link = connect(task)
        honest = link.send

        def send(kind: Kind, header: Any, body: bytes = b"") -> None:
            outgoing = Outgoing(link, task.offer.round, kind, dict(header), bytes(body))
            if not tamper(outgoing):
                honest(kind, outgoing.header, outgoing.body)

        link.send = send  # type: ignore[method-assign]
        return link

    monkeypatch.setattr(OwnerTask, "connect", opened)
