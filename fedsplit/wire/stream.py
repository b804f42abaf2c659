"""Sessions on one gRPC bidirectional stream that the owner opens.

One RPC, ``/fedsplit.Session/Open``; both directions carry the raw bytes of frames.  The server is a
plain gRPC server on its own port, with TLS except on the loopback interface.  A stream is closed
whose first frame is not a HELLO with a token that the
:class:`~fedsplit.wire.authentication.SessionAuthenticator` admits,
before anything else is read; until then it can make the server hold ``_HELLO_BYTES`` and no more.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import grpc

from fedsplit.errors import ConfigError, FedsplitError, SessionError, TokenError
from fedsplit.wire.authentication import Hello, SessionAuthenticator
from fedsplit.wire.dial import GRACE_S, channel_options, is_loopback, read_all
from fedsplit.wire.dial import METHOD as METHOD
from fedsplit.wire.dial import connect as connect
from fedsplit.wire.frames import Kind
from fedsplit.wire.link import Link
from fedsplit.wire.reconnection import RECEIVED, TICKET, ReplayBuffer, SessionTickets

log = logging.getLogger(__name__)

HELLO_DEADLINE_S = 15.0
_LEAVING = 64  # streams that are being closed
_HELLO_BYTES = 1 << 16
_SERVER_KEEPS = 3  # frames
_LOOKS_CLOSED_S = 0.2

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class ServerTls:
    """PEM bytes of the session server's certificate chain, key and, for mutual TLS, client CA."""

    certificate: bytes
    key: bytes
    client_ca: bytes | None = None


class _ThreadEach(Executor):
    """Runs each call in a daemon thread of its own, which ends with the call.

    A pool's threads would stay after the server has stopped, and the interpreter would wait at exit
    for a session that its peer keeps open.  gRPC's own bound on calls at once bounds the threads.
    """

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, name="session", daemon=True).start()
        return future


class SessionServer:
    """Listens for owners and hands each accepted session to ``on_session``.

    Args:
        authenticator: decides who may start a session.
        on_session: called in the session's own thread with its link and HELLO; must not block.
        host: interface to listen on.
        port: port, 0 = any free one.
        tls: certificate and key; required unless ``host`` is a loopback address.
        max_frame_bytes: bound on one frame.
        max_sessions: sessions at once; further ones are refused at once.
        hello_deadline_s: longest wait for a new stream's HELLO.
        on_bytes: called with (node, mode, raw frame) for everything that crosses, either way.
        reconnect_s: how long a session whose stream broke waits for a new one; 0 = not at all.
        max_waiting: streams that have not said HELLO yet; for every further one the oldest of the
            address with the most of them is closed.  They do not count as sessions, so that whoever
            opens streams and says nothing keeps nobody out.

    Raises:
        ConfigError: no TLS on an interface others can reach.
        SessionError: the port cannot be bound.
    """

    def __init__(
        self,
        authenticator: SessionAuthenticator,
        on_session: Callable[[Link, Hello], None],
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: ServerTls | None = None,
        max_frame_bytes: int = 64 << 20,
        max_sessions: int = 256,
        hello_deadline_s: float = HELLO_DEADLINE_S,
        on_bytes: Callable[[int, str, bytes], None] | None = None,
        reconnect_s: float = 0.0,
        max_waiting: int = 64,
    ) -> None:
        if tls is None and not is_loopback(host):
            raise ConfigError(
                f"session.host={host!r}: without a certificate must be a loopback address"
            )
        self._authenticator = authenticator
        self._on_session = on_session
        self._on_bytes = on_bytes
        self._max_frame = max_frame_bytes
        self._hello_deadline_s = hello_deadline_s
        self._reconnect_s = reconnect_s
        self._max_waiting = max_waiting
        self._waiting: dict[_ServerLink, str] = {}  # stream -> address, the oldest first
        self._max_sessions = max_sessions
        self._sessions: set[Link] = set()
        self._tickets: dict[str, SessionTickets] = {}
        self._links: set[Link] = set()
        self._lock = threading.Lock()
        # Each session holds one of these threads for its whole life, plus one reader thread.
        self._server = grpc.server(
            _ThreadEach(),
            options=[
                *channel_options(max_frame_bytes),
                ("grpc.max_concurrent_streams", max_sessions + max_waiting + _LEAVING),
                ("grpc.max_connection_idle_ms", 60_000),  # connections on which nobody calls
            ],
            maximum_concurrent_rpcs=max_sessions + max_waiting + _LEAVING,
        )
        handler = grpc.method_handlers_generic_handler(
            "fedsplit.Session", {"Open": grpc.stream_stream_rpc_method_handler(self._open)}
        )
        self._server.add_generic_rpc_handlers((handler,))
        address = f"[{host}]:{port}" if ":" in host.strip("[]") != host else f"{host}:{port}"
        try:
            if tls is None:
                self.port = self._server.add_insecure_port(address)
            else:
                credentials = grpc.ssl_server_credentials(
                    [(tls.key, tls.certificate)],
                    root_certificates=tls.client_ca,
                    require_client_auth=tls.client_ca is not None,
                )
                self.port = self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise SessionError(f"cannot listen on {address}: {error}") from None
        self._server.start()

    def _open(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        given = {str(key): str(value) for key, value in context.invocation_metadata() or ()}
        if TICKET in given:
            yield from self._open_again(requests, context, given)
            return
        host = context.peer().rpartition(":")[0]
        link = _ServerLink(context)
        self._make_room(link, host)
        tickets = SessionTickets(ReplayBuffer(link, _SERVER_KEEPS))
        stream, _ = tickets.replay.attach(0)
        with self._lock:
            self._links.add(link)
        self._read(requests, context, tickets, stream)
        try:
            hello = self._greet(link)
        except FedsplitError as error:
            log.warning("session refused (%s): %s", context.peer(), error)
            link.fail(error)
            with self._lock:
                self._sessions.discard(link)
        else:
            if self._reconnect_s:
                with self._lock:
                    self._tickets[tickets.name] = tickets
                context.send_initial_metadata(((TICKET, tickets.ticket),))
            self._on_session(link, hello)
        finally:
            with self._lock:
                self._waiting.pop(link, None)
        yield from self._carry(tickets, stream)

    def _make_room(self, link: _ServerLink, host: str) -> None:
        """Take a new stream among those that wait; close one of them if they are too many."""
        with self._lock:
            self._waiting[link] = host
            if len(self._waiting) <= self._max_waiting:
                return
            crowd, _ = Counter(self._waiting.values()).most_common(1)[0]
            oldest = next(waiting for waiting, of in self._waiting.items() if of == crowd)
            del self._waiting[oldest]
        error = SessionError(f"streams that wait for HELLO: must be <= {self._max_waiting}")
        log.warning("stream from %s closed: %s", crowd, error)
        oldest.fail(error)

    def _open_again(
        self, requests: Iterator[bytes], context: grpc.ServicerContext, given: dict[str, str]
    ) -> Iterator[bytes]:
        """Go on with a session whose stream broke."""
        with self._lock:
            tickets = self._tickets.get(given[TICKET].partition(".")[0])
        try:
            if tickets is None or tickets.replay.link.closed:
                raise SessionError("no such session, or it has ended")
            ticket = tickets.redeem(given[TICKET])
            received = given.get(RECEIVED, "")
            if not received.isdecimal() or len(received) > 18:
                raise SessionError("frames received: must be a number")
            link = tickets.replay.link
            assert isinstance(link, _ServerLink)
            link.move(context)
            stream, arrived = tickets.replay.attach(int(received))
        except (SessionError, TokenError) as error:
            log.warning("session not taken up again (%s): %s", context.peer(), error)
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error)[:300])
            return  # abort has raised
        log.info("session of %s goes on after frame %d", context.peer(), arrived)
        context.send_initial_metadata(((TICKET, ticket), (RECEIVED, str(arrived))))
        self._read(requests, context, tickets, stream)
        yield from self._carry(tickets, stream)

    def _carry(self, tickets: SessionTickets, stream: int) -> Iterator[bytes]:
        """Yield what goes out on a stream; at its end see what becomes of the session."""
        try:
            yield from tickets.replay.outgoing(stream)
        finally:
            self._broken(tickets, stream, "connection lost")

    def _read(
        self,
        requests: Iterator[bytes],
        context: grpc.ServicerContext,
        tickets: SessionTickets,
        stream: int,
    ) -> None:
        """Take in what a stream brings, in a thread of its own."""
        link, over = tickets.replay.link, threading.Event()

        def read() -> None:
            reason = read_all(requests, tickets.replay, stream)
            # A connection that breaks can look like an owner that closes, for a moment.
            if reason is None and not tickets.replay.said_last and over.wait(_LOOKS_CLOSED_S):
                reason = "connection lost"
            if reason is not None:
                self._broken(tickets, stream, reason)
            elif tickets.replay.current(stream):
                link.close("peer closed the stream")

        def ended() -> None:  # also of a stream that ends before anything was yielded or read
            over.set()
            self._broken(tickets, stream, "connection lost")

        context.add_callback(ended)
        threading.Thread(target=read, name="reader", daemon=True).start()

    def _broken(self, tickets: SessionTickets, stream: int, reason: str) -> None:
        """A stream is over: end its session, or let it wait for the next stream."""
        link = tickets.replay.link
        if not tickets.replay.current(stream):
            return
        with self._lock:
            known = tickets.name in self._tickets
        if link.closed or not known:
            self._leave(tickets, reason)
        else:
            tickets.wait(stream, self._reconnect_s, lambda: self._give_up(tickets, stream, reason))

    def _give_up(self, tickets: SessionTickets, stream: int, reason: str) -> None:
        if tickets.replay.current(stream):
            self._leave(tickets, f"{reason}; no new stream within {self._reconnect_s:g} s")

    def _leave(self, tickets: SessionTickets, reason: str) -> None:
        link = tickets.replay.link
        link.close(reason)
        assert isinstance(link, _ServerLink)
        link.flushed()
        with self._lock:
            self._links.discard(link)
            self._sessions.discard(link)
            self._tickets.pop(tickets.name, None)

    def _greet(self, link: Link) -> Hello:
        frame = link.expect(Kind.HELLO, self._hello_deadline_s)
        with self._lock:
            if len(self._sessions) >= self._max_sessions:
                raise SessionError(f"sessions at once: must be <= {self._max_sessions}")
            self._sessions.add(link)
        hello = self._authenticator.admit(frame)
        if self._on_bytes is not None:
            keep = self._on_bytes
            link.on_bytes = lambda data: keep(hello.node, hello.mode, data)
        link.widen(self._max_frame)
        return hello

    def stop(self) -> None:
        """Close every session and the port."""
        with self._lock:
            links = list(self._links)
            all_tickets = list(self._tickets.values())
        for link in links:
            link.close("server stopped")
        for tickets in all_tickets:
            tickets.stop()
        self._server.stop(GRACE_S).wait()


class _ServerLink(Link):
    """The server's end of a stream; a peer that does not read its last frames is cut off."""

    def __init__(self, context: grpc.ServicerContext) -> None:
        super().__init__(_HELLO_BYTES, hold_bytes=_HELLO_BYTES)
        self._context = context
        # gRPC's send waits for the peer without end, and would keep thread and frames.
        self._cut = threading.Timer(GRACE_S, lambda: self._context.cancel())
        self._cut.daemon = True

    def move(self, context: grpc.ServicerContext) -> None:
        """Tell that another stream carries it now."""
        self._context = context

    def _ended(self) -> None:
        self._cut.start()

    def flushed(self) -> None:
        """Tell that the closed link's last frame has left."""
        self._cut.cancel()
