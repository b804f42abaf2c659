"""Where sessions meet rounds: over the stream server, or over Flower messages."""

from __future__ import annotations

import ipaddress
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedsplit.config import SessionConfig
from fedsplit.errors import ConfigError, FedsplitError, SessionError, WireError
from fedsplit.observe import bound, printable
from fedsplit.wire.authentication import Hello, SessionAuthenticator
from fedsplit.wire.frames import Kind
from fedsplit.wire.link import Link
from fedsplit.wire.messages import FRAMES, STEP_TYPE, pack_frames, unpack_frames
from fedsplit.wire.stream import ServerTls, SessionServer

log = logging.getLogger(__name__)

# Where owners reach the session server, if not where it listens: behind a proxy, or on 0.0.0.0.
ADDRESS_VARIABLE = "FEDSPLIT_SESSION_ADDRESS"


def announced(host: str, port: int) -> str:
    """Return the ``host:port`` that owners are told.

    Raises:
        ConfigError: it listens on every interface and nothing says which name owners reach it by.
    """
    given = os.environ.get(ADDRESS_VARIABLE, "")
    if given:
        return given
    try:
        everywhere = ipaddress.ip_address(host.strip("[]")).is_unspecified
    except ValueError:
        everywhere = False
    if everywhere:
        raise ConfigError(
            f"session.host={host!r}: {ADDRESS_VARIABLE} must say what owners reach it by, such as "
            "fed.example.org:9093"
        )
    return f"[{host.strip('[]')}]:{port}" if ":" in host else f"{host}:{port}"


class SessionHandler(Protocol):
    """What sessions go to: a round of training, an inference server, a file server."""

    def start(self) -> None:
        """Begin its work, in threads of its own."""

    def admit(self, link: Link, hello: Hello) -> None:
        """Take a session whose token was accepted, or raise SessionError."""


class StreamTransport:
    """The session server of one run; passes each admitted session to the round under way.

    Args:
        authenticator: decides who may start a session.
        host: interface to listen on.
        port: port, 0 = any free one.
        tls: certificate and key; None on loopback only.
        ca: PEM of the authority that owners are told to trust; empty without TLS.
        max_frame_bytes: bound on one frame.
        on_bytes: see :class:`~fedsplit.wire.stream.SessionServer`.
        on_session: called with (owner, node, link) for every session that was admitted.
        reconnect_s: see :class:`~fedsplit.wire.stream.SessionServer`.

    Raises:
        ConfigError, SessionError: see :func:`announced`, SessionServer.
    """

    def __init__(
        self,
        authenticator: SessionAuthenticator,
        *,
        host: str,
        port: int,
        tls: ServerTls | None,
        ca: bytes = b"",
        max_frame_bytes: int,
        on_bytes: Callable[[int, str, bytes], None] | None = None,
        on_session: Callable[[str, int, Link], None] | None = None,
        reconnect_s: float = 0.0,
    ) -> None:
        self.authenticator = authenticator
        self.ca = ca
        self._handler: SessionHandler | None = None
        self._on_session = on_session
        self._lock = threading.Lock()
        announced(host, port)  # before the port is taken
        self.server = SessionServer(
            authenticator,
            self._admit,
            host=host,
            port=port,
            tls=tls,
            max_frame_bytes=max_frame_bytes,
            on_bytes=on_bytes,
            reconnect_s=reconnect_s,
        )
        self.address = announced(host, self.server.port)

    def serve(self, handler: SessionHandler) -> None:
        """Start ``handler`` and pass it every session from now on."""
        with self._lock:
            self._handler = handler
        handler.start()

    def _admit(self, link: Link, hello: Hello) -> None:
        with self._lock:
            current = self._handler
        with bound(owner=hello.owner, node=str(hello.node)):
            try:
                if current is None:
                    raise SessionError("no round is under way")
                current.admit(link, hello)
            except FedsplitError as error:
                log.warning("session of %s refused: %s", hello.owner, error)
                link.fail(error)
                return
            if self._on_session is not None:
                self._on_session(hello.owner, hello.node, link)

    def close(self) -> None:
        """Close all sessions and the port."""
        self.server.stop()


class MessageHandler(Protocol):
    """What sessions over Flower messages go to: a round that the calling thread runs."""

    def handshake(self, link: Link, hello: Hello, *, welcomed: bool = False) -> None:
        """Take a session whose token was accepted; a failure is recorded."""

    def lose(self, node: int, name: str, error: Exception) -> None:
        """Record an owner that will not take part."""

    def run(self) -> None:
        """Work with the sessions until all are over."""


class _MessageLink(Link):
    """A link whose frames wait until the server needs an answer; then all links' go at once."""

    def __init__(self, transport: MessageTransport, node: int, max_frame_bytes: int) -> None:
        super().__init__(max_frame_bytes, depth=1 << 16)
        self._transport = transport
        self.node = node
        self.exchange = 0

    def send(self, kind: Kind, header: Mapping[str, Any], body: bytes = b"") -> None:
        """Send a frame; BYE stays here, as no owner of a session that is over waits for a message.

        With others' sessions still under way it would go to the owner all the same, and be refused.
        """
        if kind is not Kind.BYE:
            super().send(kind, header, body)

    def _next(self, timeout_s: float) -> bytes:
        while self.incoming.empty() and not self.closed:
            self._transport.exchange(timeout_s)
        return super()._next(0.0)


class MessageTransport:
    """Carries a round's frames in Flower messages, without any second port.

    One exchange sends every waiting frame of every owner, one message each, and waits for all
    replies; a frozen bottom needs one exchange per step, a joint one two.

    Args:
        grid: Flower's grid.
        authenticator: decides who may start a session.
        session: bound on a frame, and the longest wait for an exchange (Flower takes a minute to
            notice a lost node).
        offer: (node, exchange) -> content of a message to that node, without frames.
        welcome: header of the server's first frame.
        on_bytes: called with (node, mode, raw frame) for everything that crosses, either way.
    """

    def __init__(
        self,
        grid: Grid,
        authenticator: SessionAuthenticator,
        session: SessionConfig,
        offer: Callable[[int, int], RecordDict],
        welcome: dict[str, str],
        on_bytes: Callable[[int, str, bytes], None],
    ) -> None:
        self._grid = grid
        self._authenticator = authenticator
        self._offer = offer
        self._welcome = welcome
        self._max = session.max_frame_mb << 20
        self._deadline = session.deadline_s
        self._on_bytes = on_bytes
        self._links: dict[int, _MessageLink] = {}
        self.messages = 0

    def run(self, handler: MessageHandler, nodes: Sequence[int]) -> None:
        """Run ``handler`` over messages; returns when its last step is done."""
        self._links = {node: _MessageLink(self, node, self._max) for node in nodes}
        for link in self._links.values():
            link.send(Kind.WELCOME, self._welcome)
        for node, link in self._links.items():
            try:
                hello = self._authenticator.admit(link.expect(Kind.HELLO, self._deadline))
                if hello.node != node:
                    raise SessionError(f"HELLO of node {hello.node}: must be of node {node}")
                link.on_bytes = partial(self._on_bytes, node, hello.mode)
                handler.handshake(link, hello, welcomed=True)
            except FedsplitError as error:
                link.close(str(error))
                handler.lose(node, f"node {node}", error)
        handler.run()

    def exchange(self, timeout_s: float) -> None:
        """Send all waiting frames and deliver the replies.

        Raises:
            SessionError: if nobody has anything to be sent: then nothing can be answered either.
        """
        messages = []
        for node, link in self._links.items():
            frames = link.drain()
            if not frames or link.closed:
                continue
            content = self._offer(node, link.exchange)
            content[FRAMES] = pack_frames(frames)
            messages.append(Message(content, dst_node_id=node, message_type=STEP_TYPE))
            link.exchange += 1
        if not messages:
            raise SessionError("owner owes a frame that no message asks for")
        self.messages += 2 * len(messages)
        waiting = {m.metadata.dst_node_id for m in messages}
        for reply in self._grid.send_and_receive(messages, timeout=max(timeout_s, self._deadline)):
            node = reply.metadata.src_node_id
            link = self._links[node]
            waiting.discard(node)
            if reply.has_error():
                reason = printable(reply.error.reason)
                link.close(f"owner replied with error {reply.error.code}: {reason}")
                continue
            try:
                for frame in unpack_frames(reply.content, self._max):
                    link.put(link.incoming, frame)
            except WireError as error:
                link.close(str(error))
        for node in waiting:
            self._links[node].close(f"no reply within {timeout_s:g} s")

    def exchanges(self) -> dict[int, int]:
        """Return, for each owner whose session is still sound, how many exchanges it had."""
        return {node: link.exchange for node, link in self._links.items() if not link.closed}
