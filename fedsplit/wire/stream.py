"""Sessions on one gRPC bidirectional stream that the owner opens.

One RPC, ``/fedsplit.Session/Open``; both directions carry the raw bytes of frames.  The server is a
plain gRPC server on its own port, with TLS except on the loopback interface.  A stream whose first
frame is not a HELLO with a token that the :class:`~fedsplit.wire.door.Door` admits is closed
before anything else is read; until then it can make the server hold ``_HELLO_BYTES`` and no more.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import grpc

from fedsplit.errors import ConfigError, FedsplitError, SessionError
from fedsplit.wire.door import Door, Hello
from fedsplit.wire.frames import Kind
from fedsplit.wire.link import Link

log = logging.getLogger(__name__)

METHOD = "/fedsplit.Session/Open"
HELLO_DEADLINE_S = 30.0
_GRACE_S = 2.0
_HELLO_BYTES = 1 << 16
# host:port or [IPv6]:port, so that what is judged here and what gRPC resolves are the same host.
_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})")

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class ServerTls:
    """PEM bytes of the session server's certificate chain, key and, for mutual TLS, client CA."""

    certificate: bytes
    key: bytes
    client_ca: bytes | None = None


def is_loopback(host: str) -> bool:
    """Whether ``host`` names this machine's own loopback interface."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


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


def _options(max_frame_bytes: int) -> list[tuple[str, Any]]:
    return [
        ("grpc.max_receive_message_length", max_frame_bytes),
        ("grpc.max_send_message_length", max_frame_bytes),
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.so_reuseport", 0),
    ]


class SessionServer:
    """Listens for owners and hands each accepted session to ``on_session``.

    Args:
        door: decides who may start a session.
        on_session: called in the session's own thread with its link and HELLO; must not block.
        host: interface to listen on.
        port: port, 0 = any free one.
        tls: certificate and key; required unless ``host`` is a loopback address.
        max_frame_bytes: bound on one frame.
        max_sessions: sessions at once; further ones are refused at once.
        hello_deadline_s: longest wait for a new stream's HELLO.
        on_bytes: called with (node, mode, raw frame) for everything an owner sends.

    Raises:
        ConfigError: no TLS on an interface others can reach.
        SessionError: the port cannot be bound.
    """

    def __init__(
        self,
        door: Door,
        on_session: Callable[[Link, Hello], None],
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: ServerTls | None = None,
        max_frame_bytes: int = 64 << 20,
        max_sessions: int = 256,
        hello_deadline_s: float = HELLO_DEADLINE_S,
        on_bytes: Callable[[int, str, bytes], None] | None = None,
    ) -> None:
        if tls is None and not is_loopback(host):
            raise ConfigError(
                f"session.host={host!r}: without a certificate must be a loopback address"
            )
        self._door = door
        self._on_session = on_session
        self._on_bytes = on_bytes
        self._max_frame = max_frame_bytes
        self._hello_deadline_s = hello_deadline_s
        self._links: set[Link] = set()
        self._lock = threading.Lock()
        # Each session holds one of these threads for its whole life, plus one reader thread.
        self._server = grpc.server(
            _ThreadEach(),
            options=[
                *_options(max_frame_bytes),
                ("grpc.max_concurrent_streams", max_sessions),
                ("grpc.max_connection_idle_ms", 60_000),  # connections on which nobody calls
            ],
            maximum_concurrent_rpcs=max_sessions,
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
        link = _ServerLink(context)
        with self._lock:
            self._links.add(link)
        context.add_callback(lambda: link.close("connection lost"))
        threading.Thread(target=_pump, args=(requests, link), name="reader", daemon=True).start()
        try:
            try:
                hello = self._greet(link)
            except FedsplitError as error:
                log.warning("session refused (%s): %s", context.peer(), error)
                link.fail(error)
            else:
                self._on_session(link, hello)
            while (data := link.take()) is not None:
                yield data
        finally:
            link.close("connection lost")
            link.flushed()
            with self._lock:
                self._links.discard(link)

    def _greet(self, link: Link) -> Hello:
        hello = self._door.admit(link.expect(Kind.HELLO, self._hello_deadline_s))
        if self._on_bytes is not None:
            keep = self._on_bytes
            link.on_bytes = lambda data: keep(hello.node, hello.mode, data)
        link.widen(self._max_frame)
        return hello

    def stop(self) -> None:
        """Close every session and the port."""
        with self._lock:
            links = list(self._links)
        for link in links:
            link.close("server stopped")
        self._server.stop(_GRACE_S).wait()


class _ServerLink(Link):
    """The server's end of a stream; a peer that does not read its last frames is cut off."""

    def __init__(self, context: grpc.ServicerContext) -> None:
        super().__init__(_HELLO_BYTES, hold_bytes=_HELLO_BYTES)
        # gRPC's send waits for the peer without end, and would keep thread and frames.
        self._cut = threading.Timer(_GRACE_S, context.cancel)
        self._cut.daemon = True

    def _ended(self) -> None:
        self._cut.start()

    def flushed(self) -> None:
        """Tell that the closed link's last frame has left."""
        self._cut.cancel()


def _pump(messages: Iterator[bytes], link: Link) -> None:
    """Move what the peer sends into the link's inbox until either side ends."""
    reason = "peer closed the stream"
    try:
        for data in messages:
            # Once the link is closed the rest is read and dropped: the stream's end is what tells
            # a closing owner that the server has had its last frames.
            with contextlib.suppress(SessionError):
                link.put(link.inbox, data, None)
    except grpc.RpcError as error:
        code = getattr(error, "code", lambda: "?")()
        details = getattr(error, "details", lambda: "")() or ""
        reason = f"connection lost: {code} {details[:300]}"
    except Exception as error:  # gRPC raises a bare Exception when cancelled
        reason = f"connection lost: {error}"
    link.close(reason)


def connect(
    address: str,
    *,
    ca: bytes | None,
    server_name: str = "",
    certificate: bytes | None = None,
    key: bytes | None = None,
    max_frame_bytes: int = 64 << 20,
    timeout_s: float = 30.0,
) -> Link:
    """Open a session stream to ``address`` and return its link; the caller sends HELLO.

    Args:
        address: ``host:port`` as announced in the Flower message.
        ca: PEM of the authority the owner trusts; None = plaintext, loopback only.
        server_name: name the certificate must carry, when it is not the address's host.
        certificate: PEM chain for mutual TLS, with ``key``.
        key: PEM private key for mutual TLS.
        max_frame_bytes: bound on one frame.
        timeout_s: longest wait for the connection.

    Raises:
        ConfigError: plaintext asked for on an address that is not loopback, or not host:port.
        SessionError: no connection within ``timeout_s`` (refused, wrong CA or name, unreachable).
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise ConfigError(f"session address {address[:100]!r}: must be host:port or [IPv6]:port")
    # Sessions of one process must not share a connection: one that is lost is one owner's.
    options = [*_options(max_frame_bytes), ("grpc.use_local_subchannel_pool", 1)]
    if ca is None:
        if not is_loopback(match[1]):
            raise ConfigError(f"session address {address!r}: without TLS must be loopback")
        # A proxy from the environment would carry plaintext off this machine.
        options.append(("grpc.enable_http_proxy", 0))
        channel = grpc.insecure_channel(address, options=options)
    else:
        if server_name:
            options.append(("grpc.ssl_target_name_override", server_name))
        credentials = grpc.ssl_channel_credentials(ca, key, certificate)
        channel = grpc.secure_channel(address, credentials, options=options)
    try:
        grpc.channel_ready_future(channel).result(timeout=timeout_s)
        return _ClientLink(channel, max_frame_bytes)
    except grpc.FutureTimeoutError:
        channel.close()
        raise SessionError(
            f"no session with {address} within {timeout_s:g} s: unreachable, or its certificate "
            "is not one this owner trusts"
        ) from None
    except BaseException:
        channel.close()
        raise


class _ClientLink(Link):
    """The owner's end of a stream; closing it closes the channel."""

    def __init__(self, channel: grpc.Channel, max_frame_bytes: int) -> None:
        super().__init__(max_frame_bytes, hold_bytes=max_frame_bytes)
        self._channel = channel
        call = channel.stream_stream(METHOD)(iter(self.take, None))
        self._reader = threading.Thread(target=_pump, args=(call, self), name="reader", daemon=True)
        self._reader.start()

    def close(self, reason: str = "done") -> None:
        super().close(reason)
        if threading.current_thread() is not self._reader:
            # Frames still queued (a final DONE or ERROR) go out before the channel goes.
            self._reader.join(_GRACE_S)
        self._channel.close()
