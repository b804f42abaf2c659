"""The owner's end of a session: opening a stream, and opening it again when the network broke it.

Shared with the server's end (:mod:`fedsplit.wire.stream`): the method's name, the channel's
options, and what a stream's end means.
"""

from __future__ import annotations

import ipaddress
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from fedsplit.errors import ConfigError, SessionError
from fedsplit.wire.link import Link
from fedsplit.wire.reconnection import RECEIVED, TICKET, ReplayBuffer

log = logging.getLogger(__name__)

METHOD = "/fedsplit.Session/Open"
GRACE_S = 2.0
_OWNER_KEEPS = 16  # frames; an owner may send a window of batches ahead
_AGAIN_S = (0.1, 1.0)  # first and longest pause between two attempts; each is twice the one before
# What gRPC calls a connection that is gone; UNKNOWN where TLS found that bytes were changed.
_CUT = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
# host:port or [IPv6]:port, so that what is judged here and what gRPC resolves are the same host.
_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})")


def is_loopback(host: str) -> bool:
    """Whether ``host`` names this machine's own loopback interface."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def channel_options(max_frame_bytes: int) -> list[tuple[str, Any]]:
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


def read_all(messages: Iterator[bytes], replay: ReplayBuffer, stream: int) -> str | None:
    """Take in a stream until it ends; return why it broke, None if its sender closed it."""
    try:
        replay.incoming(messages, stream)
    except grpc.RpcError as error:
        code = getattr(error, "code", lambda: "?")()
        details = getattr(error, "details", lambda: "")() or ""
        return f"connection lost: {code} {details[:300]}"
    except Exception as error:  # gRPC raises a bare Exception when cancelled
        return f"connection lost: {error}"
    return None


def connect(
    address: str,
    *,
    ca: bytes | None,
    server_name: str = "",
    certificate: bytes | None = None,
    key: bytes | None = None,
    max_frame_bytes: int = 64 << 20,
    timeout_s: float = 30.0,
    reconnect_s: float = 0.0,
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
        reconnect_s: how long to try for a new stream when the network breaks this one; 0 = not.

    Raises:
        ConfigError: plaintext asked for on an address that is not loopback, or not host:port.
        SessionError: no connection within ``timeout_s`` (refused, wrong CA or name, unreachable).
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise ConfigError(f"session address {address[:100]!r}: must be host:port or [IPv6]:port")
    # Sessions of one process must not share a connection: one that is lost is one owner's.
    options = [*channel_options(max_frame_bytes), ("grpc.use_local_subchannel_pool", 1)]
    if ca is None:
        if not is_loopback(match[1]):
            raise ConfigError(f"session address {address!r}: without TLS must be loopback")
        # A proxy from the environment would carry plaintext off this machine.
        options.append(("grpc.enable_http_proxy", 0))
        credentials = None
    else:
        if server_name:
            options.append(("grpc.ssl_target_name_override", server_name))
        credentials = grpc.ssl_channel_credentials(ca, key, certificate)

    def dial() -> grpc.Channel:
        if credentials is None:
            return grpc.insecure_channel(address, options=options)
        return grpc.secure_channel(address, credentials, options=options)

    channel = dial()
    try:
        grpc.channel_ready_future(channel).result(timeout=timeout_s)
        return _ClientLink(channel, max_frame_bytes, dial, reconnect_s)
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
    """The owner's end of a session; closing it closes the channel."""

    def __init__(
        self,
        channel: grpc.Channel,
        max_frame_bytes: int,
        dial: Callable[[], grpc.Channel],
        reconnect_s: float,
    ) -> None:
        super().__init__(max_frame_bytes, hold_bytes=max_frame_bytes)
        self._channel = channel
        self._dial = dial
        self._reconnect_s = reconnect_s
        self._ticket = ""
        self._lane = ReplayBuffer(self, _OWNER_KEEPS)
        stream, _ = self._lane.attach(0)
        call = channel.stream_stream(METHOD)(self._lane.outgoing(stream))
        self._reader = threading.Thread(
            target=self._run, args=(call, stream), name="reader", daemon=True
        )
        self._reader.start()

    def _run(self, call: Any, stream: int) -> None:
        """Take in one stream after the other until the session ends."""
        while True:
            if self._reconnect_s:
                self._ticket = _metadata(call).get(TICKET, self._ticket)
            reason = read_all(call, self._lane, stream)
            found = None
            if reason is not None and self._ticket and not self.closed and _is_cut(call):
                log.warning("%s; trying again for %g s", reason, self._reconnect_s)
                found = self._again()
            if found is None:
                self.close(reason or "peer closed the stream")
                return
            call, stream = found

    def _again(self) -> tuple[Any, int] | None:
        """Open a new stream; None when there is none in time, or the server will have none."""
        until, pause = time.monotonic() + self._reconnect_s, _AGAIN_S[0]
        while not self.closed and (left := until - time.monotonic()) > 0:
            self._channel.close()
            self._channel = channel = self._dial()
            ready = threading.Event()
            streams: list[int] = []

            def outgoing(ready: threading.Event = ready, streams: list[int] = streams) -> Any:
                ready.wait()  # until the server has said what it has
                if streams:
                    yield from self._lane.outgoing(streams[0])

            try:
                grpc.channel_ready_future(channel).result(timeout=min(left, 5.0))
                metadata = ((TICKET, self._ticket), (RECEIVED, str(self._lane.arrived)))
                call = channel.stream_stream(METHOD)(outgoing(), metadata=metadata)
                late = threading.Timer(min(left, 10.0), call.cancel)
                late.daemon = True
                late.start()
                answer = _metadata(call)
                late.cancel()
                if RECEIVED in answer:
                    streams.append(self._lane.attach(int(answer[RECEIVED]))[0])
                    log.info("session goes on")
                    return call, streams[0]
                if not _is_cut(call) and call.code() is not grpc.StatusCode.CANCELLED:
                    return None
            except (grpc.FutureTimeoutError, grpc.RpcError):
                pass
            except (SessionError, ValueError) as error:
                log.warning("session cannot go on: %s", error)
                return None
            finally:
                ready.set()
            time.sleep(min(pause, max(0.0, until - time.monotonic())))
            pause = min(2 * pause, _AGAIN_S[1])
        return None

    def close(self, reason: str = "done") -> None:
        super().close(reason)
        if threading.current_thread() is not self._reader:
            # Frames still queued (a final DONE or ERROR) go out before the channel goes.
            self._reader.join(GRACE_S)
        self._channel.close()


def _metadata(call: Any) -> dict[str, str]:
    """Return the first thing the server says on a stream; empty if it broke before."""
    try:
        return {str(key): str(value) for key, value in call.initial_metadata() or ()}
    except grpc.RpcError:
        return {}


def _is_cut(call: Any) -> bool:
    """Whether a stream that is over was ended by the network, not by either side."""
    return call.code() in _CUT
