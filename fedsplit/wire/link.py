"""A link: ordered frames both ways between one owner and the server, whatever carries them."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fedsplit.errors import DeadlineError, FrameError, SessionError
from fedsplit.wire.frames import Frame, Kind, decode, encode


@dataclass
class Traffic:
    """Bytes and frames of one link, from this side's view."""

    bytes_in: int = 0
    bytes_out: int = 0
    frames_in: int = 0
    frames_out: int = 0


class _Closed:
    """Put in a queue to wake its reader; carries why the link ended."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


class Link:
    """Two bounded queues of encoded frames with sequence numbers.

    A transport moves bytes between ``outbox`` and the peer's ``inbox``.  Frames are encoded and
    checked by the sender's thread and decoded by the reader's, so a malformed frame surfaces in
    :meth:`recv` of the session that it belongs to and in no other.

    Args:
        max_frame_bytes: bound on one frame, both ways.
        depth: frames that may wait in each queue; a peer that sends more is held back by the
            transport's flow control and costs only itself.
        on_bytes: called with every frame received, as it arrived (for transcripts).
    """

    def __init__(
        self,
        max_frame_bytes: int,
        depth: int = 64,
        on_bytes: Callable[[bytes], None] | None = None,
    ) -> None:
        self.traffic = Traffic()
        self.outbox: queue.Queue[bytes | _Closed] = queue.Queue(maxsize=depth)
        self.inbox: queue.Queue[bytes | _Closed] = queue.Queue(maxsize=depth)
        self.on_bytes = on_bytes
        self._max = max_frame_bytes
        self._sent = 0
        self._received = 0
        self._closed = threading.Event()
        self._reason = ""

    @property
    def closed(self) -> bool:
        """Whether either side has ended the link."""
        return self._closed.is_set()

    @property
    def reason(self) -> str:
        """Why the link ended; empty while it lives."""
        return self._reason

    @property
    def counters(self) -> tuple[int, int]:
        """Frames sent and received so far: the next sequence numbers, for a link that moves."""
        return self._sent, self._received

    @counters.setter
    def counters(self, value: tuple[int, int]) -> None:
        self._sent, self._received = value

    def drain(self) -> list[bytes]:
        """Return and remove the outgoing frames queued so far."""
        frames = []
        while True:
            try:
                data = self.outbox.get_nowait()
            except queue.Empty:
                return frames
            if isinstance(data, bytes):
                frames.append(data)

    def send(self, kind: Kind, header: Mapping[str, Any], body: bytes = b"") -> None:
        """Queue one frame.

        Raises:
            FrameError: if the frame breaks its schema or bound.
            SessionError: if the link is closed, or the peer has stopped reading for 60 s.
        """
        data = encode(Frame(kind, header, body), self._sent, self._max)
        self.put(self.outbox, data)
        self._sent += 1
        self.traffic.bytes_out += len(data)
        self.traffic.frames_out += 1

    def put(self, into: queue.Queue[bytes | _Closed], data: bytes, timeout_s: float = 60.0) -> None:
        """Put ``data`` into one of the two queues, giving up when the link closes."""
        waited = 0.0
        while True:
            if self._closed.is_set():
                raise SessionError(f"session closed: {self._reason}")
            try:
                into.put(data, timeout=0.5)
                return
            except queue.Full:
                waited += 0.5
                if waited >= timeout_s:
                    self.close(f"peer stopped reading for {timeout_s:.0f} s")

    def recv(self, timeout_s: float) -> Frame:
        """Return the next frame.

        Raises:
            DeadlineError: nothing came within ``timeout_s`` seconds.
            FrameError: the frame is malformed or out of sequence.
            SessionError: the link was closed, or the peer sent an ERROR frame.
        """
        data = self._next(timeout_s)
        self.traffic.bytes_in += len(data)
        self.traffic.frames_in += 1
        if self.on_bytes is not None:
            self.on_bytes(data)
        frame = decode(data, self._max)
        if frame.sequence != self._received:
            raise FrameError(f"frame sequence {frame.sequence}: must be {self._received}")
        self._received += 1
        if frame.kind is Kind.ERROR:
            raise SessionError(f"peer gave up: {frame['error']}: {frame['message']}")
        return frame

    def _next(self, timeout_s: float) -> bytes:
        """Return the next frame's bytes; frames queued before a close are still delivered."""
        end = time.monotonic() + timeout_s
        while True:
            left = end - time.monotonic()
            try:
                # Waiting in slices: a close that found the queue full left no marker in it.
                data = self.inbox.get(timeout=max(0.0, min(left, 0.5)))
            except queue.Empty:
                if self._closed.is_set():
                    raise SessionError(f"session closed: {self._reason}") from None
                if left <= 0:
                    raise DeadlineError(f"no frame within {timeout_s:g} s") from None
                continue
            if isinstance(data, bytes):
                return data
            raise SessionError(f"session closed: {self._reason or data.reason}")

    def expect(self, kind: Kind, timeout_s: float) -> Frame:
        """Return the next frame, which must be of ``kind``.

        Raises:
            FrameError: if it is of another kind; else as :meth:`recv`.
        """
        frame = self.recv(timeout_s)
        if frame.kind is not kind:
            raise FrameError(f"{frame.kind.name} frame: must be {kind.name}")
        return frame

    def fail(self, error: Exception) -> None:
        """Tell the peer why this side gives up, then close.  Never raises."""
        try:
            header = {"error": type(error).__name__[:200], "message": str(error)[:2000]}
            self.send(Kind.ERROR, header)
        except (SessionError, FrameError):
            pass  # the peer is gone; the reason is kept on this side
        self.close(f"{type(error).__name__}: {error}")

    def close(self, reason: str = "done") -> None:
        """End the link; frames already queued are still delivered.  Idempotent."""
        if self._closed.is_set():
            return
        self._reason = reason
        self._closed.set()
        for box in (self.outbox, self.inbox):
            # A full queue's reader polls `closed` once it has drained it.
            with contextlib.suppress(queue.Full):
                box.put_nowait(_Closed(reason))

    def take(self, poll_s: float = 0.5) -> bytes | None:
        """Return the next outgoing frame for the transport, or None when the link has ended."""
        while True:
            try:
                data = self.outbox.get(timeout=poll_s)
            except queue.Empty:
                if self._closed.is_set():
                    return None
                continue
            return None if isinstance(data, _Closed) else data


def loopback(max_frame_bytes: int, depth: int = 64) -> tuple[Link, Link]:
    """Return two links whose queues are each other's, for tests within one process."""
    left = Link(max_frame_bytes, depth)
    right = Link(max_frame_bytes, depth)
    right.inbox, right.outbox = left.outbox, left.inbox
    return left, right
