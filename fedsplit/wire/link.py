"""A link: ordered frames both ways between one owner and the server, whatever carries them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fedsplit.errors import DeadlineError, FrameError, SessionError
from fedsplit.observe import printable
from fedsplit.wire.frames import Frame, Kind, decode, encode

_SEND_S = 60.0
_FAIL_S = 1.0


@dataclass
class Traffic:
    """Bytes and frames of one link, from this side's view."""

    bytes_in: int = 0
    bytes_out: int = 0
    frames_in: int = 0
    frames_out: int = 0


class FrameQueue:
    """Encoded frames waiting for their reader, first in first out, bounded in number and bytes.

    Closing keeps what is inside and refuses what comes after, so nothing that was accepted is lost.

    Args:
        depth: frames that may wait.
        hold_bytes: bytes that may wait (one frame may always), None = as many as ``depth`` allows.
    """

    def __init__(self, depth: int, hold_bytes: int | None = None) -> None:
        self.hold_bytes = hold_bytes
        self._depth = depth
        self._frames: deque[bytes] = deque()
        self._bytes = 0
        self._reason: str | None = None
        self._change = threading.Condition()

    @property
    def closed(self) -> bool:
        """Whether it takes no more frames."""
        return self._reason is not None

    @property
    def reason(self) -> str:
        """Why it was closed; empty while it is open."""
        return self._reason or ""

    @property
    def held(self) -> int:
        """Bytes waiting."""
        return self._bytes

    def empty(self) -> bool:
        """Whether no frame waits."""
        return not self._frames

    def put(self, data: bytes, timeout_s: float | None) -> bool:
        """Add a frame, waiting for room; False if it stayed full or is closed."""
        with self._change:
            if not self.closed and not self._has_room(data):
                self._change.wait_for(lambda: self.closed or self._has_room(data), timeout_s)
                if not self._has_room(data):
                    return False
            if self.closed:
                return False
            self._frames.append(data)
            self._bytes += len(data)
            self._change.notify_all()
            return True

    def put_nowait(self, data: bytes) -> None:
        """Add a frame.

        Raises:
            SessionError: if there is no room, or the queue is closed.
        """
        if not self.put(data, 0.0):
            raise SessionError(f"no room for another frame: {self.reason or 'too many wait'}")

    def get(self, timeout_s: float | None) -> bytes | None:
        """Take the oldest frame; None if none came in time, or the queue is closed and empty."""
        with self._change:
            if not self._frames:
                self._change.wait_for(lambda: self.closed or self._frames, timeout_s)
                if not self._frames:
                    return None
            data = self._frames.popleft()
            self._bytes -= len(data)
            self._change.notify_all()
            return data

    def close(self, reason: str) -> bool:
        """Refuse further frames and wake whoever waits; False if it was closed already."""
        with self._change:
            if self.closed:
                return False
            self._reason = reason
            self._change.notify_all()
            return True

    def _has_room(self, data: bytes) -> bool:
        if not self._frames:
            return True
        within = self.hold_bytes is None or self._bytes + len(data) <= self.hold_bytes
        return within and len(self._frames) < self._depth


class Link:
    """Two bounded queues of encoded frames with sequence numbers.

    A transport moves bytes between ``outgoing`` and the peer's ``incoming``.  Frames are encoded
    and checked by the sender's thread and decoded by the reader's, so a malformed frame surfaces in
    :meth:`recv` of the session that it belongs to and in no other.  Any thread may send, fail or
    close; one thread at a time receives.

    Args:
        max_frame_bytes: bound on one frame, both ways.
        depth: frames that may wait in each queue; a peer that sends more is held back by the
            transport's flow control and costs only itself.
        on_bytes: called with every frame, received or sent, as it crossed (for transcripts).
        hold_bytes: bytes that may wait in each queue, None = as many as ``depth`` allows.
    """

    def __init__(
        self,
        max_frame_bytes: int,
        depth: int = 64,
        on_bytes: Callable[[bytes], None] | None = None,
        hold_bytes: int | None = None,
    ) -> None:
        self.traffic = Traffic()
        self.outgoing = FrameQueue(depth, hold_bytes)
        self.incoming = FrameQueue(depth, hold_bytes)
        self.on_bytes = on_bytes
        self._max = max_frame_bytes
        self._sent = 0
        self._received = 0
        self._sending = threading.Lock()

    @property
    def closed(self) -> bool:
        """Whether either side has ended the link."""
        return self.incoming.closed

    @property
    def reason(self) -> str:
        """Why the link ended; empty while it lives."""
        return self.incoming.reason

    @property
    def counters(self) -> tuple[int, int]:
        """Frames sent and received so far: the next sequence numbers, for a link that moves."""
        return self._sent, self._received

    @counters.setter
    def counters(self, value: tuple[int, int]) -> None:
        self._sent, self._received = value

    def widen(self, max_frame_bytes: int) -> None:
        """Raise the bounds on one frame and on the bytes that wait, once the peer is known."""
        self._max = max_frame_bytes
        for queue in (self.incoming, self.outgoing):
            queue.hold_bytes = max_frame_bytes

    def drain(self) -> list[bytes]:
        """Return and remove the outgoing frames queued so far."""
        frames = []
        while (data := self.outgoing.get(0.0)) is not None:
            frames.append(data)
        return frames

    def send(self, kind: Kind, header: Mapping[str, Any], body: bytes = b"") -> None:
        """Queue one frame.

        Raises:
            FrameError: if the frame breaks its schema or bound.
            SessionError: if the link is closed, or the peer has stopped reading for 60 s.
        """
        with self._sending:
            self._send(kind, header, body, _SEND_S)

    def _send(self, kind: Kind, header: Mapping[str, Any], body: bytes, timeout_s: float) -> None:
        data = encode(Frame(kind, header, body), self._sent, self._max)
        self.put(self.outgoing, data, timeout_s)
        if self.on_bytes is not None:
            self.on_bytes(data)
        self._sent += 1
        self.traffic.bytes_out += len(data)
        self.traffic.frames_out += 1

    def put(self, into: FrameQueue, data: bytes, timeout_s: float | None = _SEND_S) -> None:
        """Put ``data`` into one of the two queues, giving up when the link closes.

        Raises:
            SessionError: if the link is closed, or there was no room for ``timeout_s`` seconds.
        """
        if not into.put(data, timeout_s):
            if not into.closed:
                self.close(f"peer stopped reading for {timeout_s or 0.0:g} s")
            raise SessionError(f"session closed: {self.reason or into.reason}")

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
            told = printable(f"{frame['error']}: {frame['message']}")
            raise SessionError(f"peer gave up: {told}")
        return frame

    def _next(self, timeout_s: float) -> bytes:
        """Return the next frame's bytes; frames queued before a close are still delivered."""
        data = self.incoming.get(max(0.0, timeout_s))
        if data is not None:
            return data
        if self.incoming.closed and self.incoming.empty():
            raise SessionError(f"session closed: {self.reason}")
        raise DeadlineError(f"no frame within {timeout_s:g} s")

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
        """Tell the peer why this side gives up, then close.  Never raises, never waits long.

        A peer that has stopped reading is not told: it would hold up whoever gives up on it.
        """
        try:
            # Paths and foreign text may hold surrogates, which no frame carries.
            text = str(error).encode("utf-8", "replace").decode()
        except Exception:
            text = "(no message)"
        name = type(error).__name__[:200]
        if self._sending.acquire(timeout=_FAIL_S):
            try:
                self._send(Kind.ERROR, {"error": name, "message": text[:2000]}, b"", _FAIL_S)
            except (SessionError, FrameError):
                pass  # the peer is gone; the reason is kept on this side
            finally:
                self._sending.release()
        self.close(f"{name}: {text}")

    def close(self, reason: str = "done") -> None:
        """End the link; frames already queued are still delivered.  Idempotent."""
        if self.incoming.close(reason):  # the first of several closers gives the reason
            self._ended()
        self.outgoing.close(self.incoming.reason)

    def _ended(self) -> None:
        """Called once, by whoever closes the link first."""

    def take(self) -> bytes | None:
        """Return the next outgoing frame for the transport, or None when the link has ended."""
        return self.outgoing.get(None)


def loopback(max_frame_bytes: int, depth: int = 64) -> tuple[Link, Link]:
    """Return two links whose queues are each other's, for tests within one process."""
    left = Link(max_frame_bytes, depth)
    right = Link(max_frame_bytes, depth)
    right.incoming, right.outgoing = left.outgoing, left.incoming
    return left, right
