"""The metrics endpoint: ``GET /metrics`` on the loopback interface, and nothing else.

It is plain HTTP without any authentication, so it listens on 127.0.0.1 alone; a collector on
another machine comes through a tunnel or a reverse proxy that authenticates.  A caller that sends
its request slowly is cut off, and callers beyond a few at once are turned away, so that the worst
caller costs a few threads for a few seconds.
"""

from __future__ import annotations

import contextlib
import http.server
import logging
import socket
import threading
from collections.abc import Callable
from typing import Any

from fedsplit.errors import RunError

from .open_metrics import CONTENT_TYPE

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
MOST_CALLERS = 8
CALL_S = 10.0


class MetricsPort:
    """Serves a text until closed.

    Args:
        port: to listen on; 0 = any free one.
        text: makes the body, called for every request.
        call_s: longest time for one caller.

    Raises:
        RunError: the port is taken.
    """

    def __init__(self, port: int, text: Callable[[], str], call_s: float = CALL_S) -> None:
        try:
            self._server = _Server((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            raise RunError(f"output.metrics-port={port}: must be free on {HOST}: {error}") from None
        self._server.text, self._server.call_s = text, call_s
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.2,), name="metrics", daemon=True
        )
        self._thread.start()

    @property
    def url(self) -> str:
        """Where the metrics are."""
        return f"http://{HOST}:{self.port}/metrics"

    def close(self) -> None:
        """Free the port."""
        self._server.shutdown()
        self._server.server_close()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 2 * MOST_CALLERS
    text: Callable[[], str]
    call_s: float

    def __init__(self, *arguments: Any) -> None:
        self._room = threading.BoundedSemaphore(MOST_CALLERS)
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        cut = threading.Timer(self.call_s, _cut, (request,))
        cut.daemon = True
        cut.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            cut.cancel()
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a caller of the metrics port was cut off", exc_info=True)


def _cut(request: socket.socket) -> None:
    with contextlib.suppress(OSError):
        request.shutdown(socket.SHUT_RDWR)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server
    server_version = "fedsplit"
    sys_version = ""

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(404)
            return
        body = self.server.text().encode()
        self.send_response(200)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: a scrape is no event of the run."""
