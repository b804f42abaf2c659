"""A TCP proxy on the loopback interface that does to a connection what networks do."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time

_CHUNK = 1 << 16
_LINGER = struct.pack("ii", 1, 0)  # close with a reset, as a cut cable's peer is answered


class Proxy(contextlib.AbstractContextManager["Proxy"]):
    """Passes connections on to one port of the loopback interface; disturbs them when told to."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.passed = 0  # bytes, both ways
        self.connections = 0
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._flowing = threading.Event()
        self._flowing.set()
        self._refuse_until = 0.0
        self._flip = ""
        self._cut_after: int | None = None
        self._bytes_per_s = 0.0
        self._closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    # ---- what networks do -------------------------------------------------------------------

    def cut(self, seconds: float = 0.0) -> None:
        """Reset every connection and let none through for a while."""
        self._refuse_until = time.monotonic() + seconds
        self._reset()

    def stall(self, seconds: float) -> None:
        """Pass nothing on for a while; connections stay open.  Returns at once."""
        self._flowing.clear()
        timer = threading.Timer(seconds, self._flowing.set)
        timer.daemon = True
        timer.start()

    def flip(self, *, answer: bool = False) -> None:
        """Turn over one bit of the next chunk that passes, or of the next answer."""
        self._flip = "answer" if answer else "any"

    def truncate(self, after: int) -> None:
        """Pass ``after`` more bytes on, then reset the connection in the middle of a message."""
        self._cut_after = after

    def slow(self, bytes_per_s: float) -> None:
        """Pass so many bytes a second on; 0 = all at once."""
        self._bytes_per_s = bytes_per_s

    # ---- passing on -------------------------------------------------------------------------

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if time.monotonic() < self._refuse_until:
                _reset(client)
                continue
            try:
                server = socket.create_connection(("127.0.0.1", self._target), timeout=5)
            except OSError:
                _reset(client)
                continue
            server.settimeout(None)
            with self._lock:
                self.connections += 1
                self._open |= {client, server}
            for pair in ((client, server, False), (server, client, True)):
                threading.Thread(target=self._pass, args=pair, daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, answer: bool) -> None:
        try:
            while data := source.recv(_CHUNK):
                self._flowing.wait()
                sink.sendall(self._treated(data, sink, answer))
                self.passed += len(data)
            with contextlib.suppress(OSError):
                sink.shutdown(socket.SHUT_WR)
        except OSError:
            self._drop(source, sink)

    def _treated(self, data: bytes, sink: socket.socket, answer: bool) -> bytes:
        wanted = self._flip == "any" or (self._flip == "answer" and answer)
        if wanted and len(data) > 64:  # of a message, not of an acknowledgement
            self._flip = ""
            middle = len(data) // 2
            data = data[:middle] + bytes([data[middle] ^ 0x10]) + data[middle + 1 :]
        if self._cut_after is not None:
            self._cut_after -= len(data)
            if self._cut_after < 0:
                sink.sendall(data[: self._cut_after])
                self._cut_after = None
                self._reset()
                raise OSError("cut off")
        while self._bytes_per_s and data and not self._closed:
            step = max(1, int(self._bytes_per_s / 10))
            sink.sendall(data[:step])
            data = data[step:]
            time.sleep(step / self._bytes_per_s)
        return data

    def _drop(self, *sockets: socket.socket) -> None:
        with self._lock:
            self._open -= set(sockets)
        for one in sockets:
            _reset(one)

    def _reset(self) -> None:
        with self._lock:
            everything = list(self._open)
        self._drop(*everything)

    def __exit__(self, *_: object) -> None:
        """Stop listening and reset every connection."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes who waits for connections
        self._listener.close()
        self._flowing.set()
        self._reset()


def _reset(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER)
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    with contextlib.suppress(OSError):
        one.close()
