"""A session server that echoes, and peers to talk to it: with our code, and without."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator

import grpc

import fedsplit
from fedsplit.errors import FedsplitError
from fedsplit.wire.authentication import Hello, SessionAuthenticator
from fedsplit.wire.frames import PROTOCOL, Kind
from fedsplit.wire.link import Link
from fedsplit.wire.stream import METHOD, ServerTls, SessionServer, connect
from fedsplit.wire.tokens import TokenBook

RUN = 7
MAX_FRAME = 1 << 20


def eventually(true: Callable[[], bool], within_s: float = 60.0) -> bool:
    end = time.monotonic() + within_s
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


class Echo:
    """A server whose sessions echo every frame's body, and remember how they ended."""

    def __init__(self, tls: ServerTls | None = None, **options) -> None:
        self.book = TokenBook()
        self.ended: queue.Queue[tuple[str, FedsplitError]] = queue.Queue()
        self.links: list[Link] = []
        options.setdefault("max_frame_bytes", MAX_FRAME)
        self.server = SessionServer(
            SessionAuthenticator(RUN, self.book), self._start, tls=tls, **options
        )
        self.address = f"127.0.0.1:{self.server.port}"

    def _start(self, link: Link, hello: Hello) -> None:
        self.links.append(link)
        threading.Thread(target=self._serve, args=(link, hello), daemon=True).start()

    def _serve(self, link: Link, hello: Hello) -> None:
        try:
            while True:
                frame = link.recv(30.0)
                header = {"step": frame["step"], "codec": "fp32", "shape": []}
                link.send(Kind.LOGITS, header, frame.body)
        except FedsplitError as error:
            link.fail(error)
            self.ended.put((hello.owner, error))

    def open(self, owner: str = "owner", node: int = 1, ca: bytes | None = None, **options) -> Link:
        token = self.book.issue(RUN, node, 1, "train")
        options.setdefault("max_frame_bytes", MAX_FRAME)
        link = connect(self.address, ca=ca, **options)
        link.send(Kind.HELLO, hello(token, owner=owner, node=node))
        return link

    def sessions(self) -> int:
        return len(self.server._links)


def hello(token: str, /, **changes: object) -> dict[str, object]:
    header = {
        "protocol": PROTOCOL,
        "classes": "",
        "version": fedsplit.__version__,
        "token": token,
        "run": RUN,
        "node": 1,
        "round": 1,
        "mode": "train",
        "owner": "owner",
        "digest": "",
    }
    return {**header, **changes}


def grad(step: int) -> dict[str, object]:
    return {"step": step, "codec": "fp32", "shape": [], "weight": 1.0}


def talk(link: Link, steps: int, size: int = 1000) -> None:
    for step in range(steps):
        body = bytes([step % 256]) * size
        link.send(Kind.GRAD, grad(step), body)
        frame = link.expect(Kind.LOGITS, 20.0)
        assert frame["step"] == step
        assert bytes(frame.body) == body


@contextlib.contextmanager
def serving(tls: ServerTls | None = None, **options) -> Iterator[Echo]:
    echo = Echo(tls, **options)
    try:
        yield echo
    finally:
        echo.server.stop()


@contextlib.contextmanager
def bare_stream(echo: Echo) -> Iterator[tuple[grpc.Channel, grpc.Call, queue.Queue[bytes | None]]]:
    """A peer without any of our code: raw bytes into the stream."""
    channel = grpc.insecure_channel(echo.address, options=[("grpc.use_local_subchannel_pool", 1)])
    sending: queue.Queue[bytes | None] = queue.Queue()
    call = channel.stream_stream(METHOD)(iter(sending.get, None))
    try:
        yield channel, call, sending
    finally:
        sending.put(None)
        channel.close()
