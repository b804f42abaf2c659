"""Carrying one link over several streams, one after the other.

A network cut ends a stream, not the session: both ends keep their link, and the owner opens a new
stream for it with a ticket.  Each end says how many frames have reached it, and the other sends on
from there, out of the last few that it keeps: no frame is lost, none comes twice, and no step is
counted twice.  What was kept is sent again byte for byte, so nothing new is shown.

The ticket travels in the metadata of the stream (under TLS), is good for one use, and is compared
in constant time.  The one before it stays good until its successor was used, because the answer
that brings the successor may be lost on the way.
"""

from __future__ import annotations

import hmac
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from fedsplit.errors import SessionError, TokenError
from fedsplit.wire.frames import KIND_AT, Kind
from fedsplit.wire.link import Link

TICKET = "fedsplit-ticket"
RECEIVED = "fedsplit-received"
KEEP_BYTES = 8 << 20
_POLL_S = 0.5
_LAST = {bytes([Kind.BYE]), bytes([Kind.ERROR])}


class ReplayBuffer:
    """The frames of one link: which went out, which came in, over which stream.

    Args:
        link: whose.
        keep_frames: last frames that are kept whatever their size; more are kept up to
            ``KEEP_BYTES``.  A peer that lacks an older one cannot go on.
    """

    def __init__(self, link: Link, keep_frames: int) -> None:
        self.link = link
        self.arrived = 0
        self.said_last = False  # a frame after which a session ends has passed, either way
        self._keep = keep_frames
        self._stream = 0
        self._sent: deque[bytes] = deque()
        self._bytes = 0
        self._base = 0  # number of the first frame that is kept
        self._next = 0  # number of the next frame that the stream carries
        self._lock = threading.Lock()
        self._arriving = threading.Lock()
        self._taking = threading.Lock()

    def attach(self, received: int) -> tuple[int, int]:
        """Begin a new stream; return its number and how many frames have arrived so far.

        Args:
            received: frames that the peer has.

        Raises:
            SessionError: the peer lacks a frame that is no longer kept, or has one too many.
        """
        with self._arriving, self._lock:
            if not self._base <= received <= self._base + len(self._sent):
                raise SessionError(
                    f"session cannot go on at frame {received}: must be in "
                    f"[{self._base}, {self._base + len(self._sent)}]"
                )
            self._next = received
            self._stream += 1
            return self._stream, self.arrived

    def current(self, stream: int) -> bool:
        """Whether no newer stream has taken over."""
        return stream == self._stream

    def outgoing(self, stream: int) -> Iterator[bytes]:
        """Yield what goes out on a stream until it is replaced or the link has ended."""
        while True:
            with self._lock:
                if stream != self._stream:
                    return
                at = self._next - self._base
                data = self._sent[at] if at < len(self._sent) else None
                self._next += data is not None
            if data is not None:
                yield data
            elif not self._take(stream):
                return

    def _take(self, stream: int) -> bool:
        """Fetch one more frame from the outgoing, if one comes; False when there is no more."""
        with self._taking:  # a stream that was replaced may still be waiting here
            with self._lock:
                if stream != self._stream or self._next < self._base + len(self._sent):
                    return True  # replaced; or the one that waited here has fetched a frame
            data = self.link.outgoing.get(_POLL_S)
            if data is None:
                return not (self.link.outgoing.closed and self.link.outgoing.empty())
            self._look(data)
            with self._lock:
                self._sent.append(data)
                self._bytes += len(data)
                while len(self._sent) > self._keep and self._bytes > KEEP_BYTES:
                    if self._base >= self._next:
                        break  # not sent yet
                    self._bytes -= len(self._sent.popleft())
                    self._base += 1
            return True

    def incoming(self, messages: Iterable[bytes], stream: int) -> None:
        """Move what a stream brings into the incoming; raises what the stream raises."""
        for data in messages:
            while True:
                with self._arriving:
                    if stream != self._stream:
                        return
                    if self.link.incoming.put(data, _POLL_S):
                        self.arrived += 1
                        self._look(data)
                        break
                    # Once the link is closed the rest is read and dropped: the stream's end is what
                    # tells a closing owner that the server has had its last frames.
                    if self.link.incoming.closed:
                        break

    def _look(self, data: bytes) -> None:
        if data[KIND_AT : KIND_AT + 1] in _LAST:
            self.said_last = True


class SessionTickets:
    """The tickets of one session at the server."""

    def __init__(self, replay: ReplayBuffer) -> None:
        self.replay = replay
        self.name = secrets.token_hex(8)
        self._valid = ("", secrets.token_hex(32))
        self._lock = threading.Lock()
        self._timers: dict[int, threading.Timer] = {}

    def wait(self, stream: int, seconds: float, give_up: Callable[[], None]) -> None:
        """Call ``give_up`` after a while, once for a stream however often it is said to be over."""
        with self._lock:
            if stream in self._timers:
                return
            for timer in self._timers.values():
                timer.cancel()
            self._timers[stream] = timer = threading.Timer(seconds, give_up)
            timer.daemon = True
            timer.start()

    def stop(self) -> None:
        """Wait for nothing any more."""
        with self._lock:
            for timer in self._timers.values():
                timer.cancel()

    @property
    def ticket(self) -> str:
        """The newest ticket."""
        return f"{self.name}.{self._valid[1]}"

    def redeem(self, ticket: str) -> str:
        """Take a ticket and return the next one.

        Raises:
            TokenError: it is not the newest one, nor the one before.
        """
        given = ticket.partition(".")[2].encode()
        with self._lock:
            old, new = self._valid
            is_new = hmac.compare_digest(given, new.encode())
            is_old = hmac.compare_digest(given, old.encode()) and bool(old)
            if not (is_new or is_old):
                raise TokenError("session ticket: must be the last one given")
            self._valid = (new if is_new else old, secrets.token_hex(32))
        return self.ticket
