"""Driving an owner's side of a session on a stream, from HELLO to BYE."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

from fedsplit import storage
from fedsplit.errors import ModelError, SessionError
from fedsplit.models.bundle.bottom import Bundle
from fedsplit.observe import printable
from fedsplit.owners.handshake import greet, request_files
from fedsplit.owners.ledger.disclosure import Outgoing
from fedsplit.owners.task import OwnerTask
from fedsplit.wire.frames import Frame, Kind
from fedsplit.wire.link import Link
from fedsplit.wire.transfer import receive_files


class FrameAnswerer(Protocol):
    """What an owner's side of a session must do: training, prediction or generation."""

    @property
    def done(self) -> bool:
        """Whether the session has nothing left to do."""

    def ready(self) -> Outgoing:
        """Return the frame that announces how much follows."""

    def handle(self, frame: Frame) -> Iterator[Outgoing]:
        """Yield the frames that answer ``frame``."""


A = TypeVar("A", bound=FrameAnswerer)


def run_session(link: Link, task: OwnerTask, build: Callable[[], A]) -> A:
    """Run one session from HELLO to BYE and return the owner's side of it.

    Args:
        link: a fresh link to the server.
        task: what was agreed to.
        build: makes the owner's side; called once the bottom is on disk.

    Raises:
        FedsplitError: whatever went wrong; the server is told what
            :func:`~fedsplit.owners.policy.refusals.tellable` lets out.
    """
    check, session = task.check, task.config.session
    try:
        greet(link, task.offer, check, session.deadline_s)
        if not task.bottom_folder.exists():
            request_files(link, task.offer, check)
            store_bottom(receive_files(link, session.deadline_s), task)
        owner = build()
        check.send(link, owner.ready())
        # A wave may have to wait for the ones before it, hence the longer patience.
        while (frame := link.recv(session.idle_s)).kind is not Kind.BYE:
            for outgoing in owner.handle(frame):
                check.send(link, outgoing)
        if not owner.done:
            reason = printable(frame["reason"])
            raise SessionError(f"server ended the session early: {reason}")
        link.close()
    except Exception as error:
        check.fail(link, error)
        raise
    return owner


def store_bottom(files: dict[str, bytes], task: OwnerTask) -> None:
    """Verify a received bottom and keep it under its digest; nothing unverified is ever kept.

    Raises:
        ModelError: wrong digest or unacceptable files.
    """
    bundle, digest = Bundle(files), task.offer.digest
    if bundle.digest != digest:
        raise ModelError(f"bottom received has digest {bundle.digest}: must be {digest}")
    folder = task.bottom_folder
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        with storage.new_folder(folder, concurrent=True) as draft:
            bundle.save(draft)
    except OSError:
        if not folder.exists():  # else another process of this owner made it, of the same digest
            raise
