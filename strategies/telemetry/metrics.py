"""The metrics endpoint: ``GET /metrics`` on the loopback interface, and nothing else.

The body is OpenMetrics text (openmetrics.io, version 1.0.0), made from the live page
(:mod:`strategies.telemetry.status`).  No label carries an owner's name or anything that an owner
chose: whoever may scrape the server learns how many owners there are, never which.

It is plain HTTP without any authentication, so it listens on 127.0.0.1 alone; a collector on
another machine comes through a tunnel or a reverse proxy that authenticates.  A caller that sends
its request slowly is cut off, and callers beyond a few at once are turned away, so that the worst
caller costs a few threads for a few seconds.
"""

from __future__ import annotations

import contextlib
import http.server
import logging
import math
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
    StateSetMetricFamily,
)
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import CollectorRegistry

from fedsplit.errors import RunError

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
MOST_CALLERS = 8
CALL_S = 10.0
VERDICTS = ("in_lineage", "not_shown", "independent", "off")
_SERVED = ("sessions", "failed", "texts", "tokens", "forwards")


class PageRegistry(CollectorRegistry):
    """Metric families of one page (:meth:`strategies.telemetry.status.Live.page`)."""

    def __init__(self, page: Mapping[str, Any]) -> None:
        super().__init__(auto_describe=False)
        self._page = page

    def collect(self) -> Iterator[Metric]:
        """Yield the page's families; values that are no finite numbers are left out."""
        page = self._page
        run = {key: str(page.get(key, "")) for key in ("run", "strategy", "version")}
        yield InfoMetricFamily("fedsplit_run", "The run.", run)
        yield _gauge("round", "Round under way, from 1; 0 before the first.", page.get("round"))
        yield _gauge("rounds", "Rounds that the run is to have.", page.get("rounds"))
        yield _counter("rounds_done", "Training rounds closed.", page.get("rounds_done"))
        yield _counter("steps", "Cohort steps of the top.", page.get("steps_done"))
        yield _counter("samples", "Samples in closed rounds.", page.get("samples"))
        seen = "Tokens whose privatised representation was received in closed rounds."
        yield _counter("tokens_seen", seen, page.get("tokens"))
        yield _counter("owners_lost", "Times that an owner was left out.", page.get("lost"))
        states = "Owners by what became of their last session."
        yield _gauges("owners", states, "state", page.get("states") or {})
        sent = CounterMetricFamily(
            "fedsplit_session_bytes",
            "Bytes of sessions' frames, from owners (up) and to them (down).",
            labels=["direction"],
            unit="bytes",
        )
        for way in ("up", "down"):
            sent.add_metric([way], page.get(f"bytes_{way}", 0))
        yield sent
        for key in ("loss", "accuracy"):
            of_modes = {mode: (page.get(mode) or {}).get(key) for mode in ("train", "evaluate")}
            yield _gauges(key, f"Owners' mean {key} in the last closed round.", "mode", of_modes)
        yield _step_seconds(page.get("step_seconds") or {})
        if lineage := page.get("lineage"):
            yield _verdict(str(lineage.get("verdict")))
            yield _gauge("lineage_score", "Mean score over blocks.", lineage.get("score"))
        served = page.get("serving") or {}
        for key in _SERVED:
            if key in served:
                yield _counter(f"served_{key}", f"{key} since serving began.", served[key])


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _gauge(name: str, text: str, value: Any) -> Metric:
    return GaugeMetricFamily(f"fedsplit_{name}", text, value if _finite(value) else None)


def _counter(name: str, text: str, value: Any) -> Metric:
    return CounterMetricFamily(f"fedsplit_{name}", text, value if _finite(value) else None)


def _gauges(name: str, text: str, label: str, values: Mapping[str, Any]) -> Metric:
    family = GaugeMetricFamily(f"fedsplit_{name}", text, labels=[label])
    for key, value in values.items():
        if _finite(value):
            family.add_metric([key], value)
    return family


def _step_seconds(steps: Mapping[str, Any]) -> Metric:
    buckets = [(repr(float(bound)), below) for bound, below in steps.get("buckets", ())]
    return HistogramMetricFamily(
        "fedsplit_step_seconds",
        "Seconds from one cohort step's end to the next one's.",
        [*buckets, ("+Inf", steps.get("count", 0))],
        steps.get("sum", 0.0),
        unit="seconds",
    )


def _verdict(found: str) -> Metric:
    known = VERDICTS if found in VERDICTS else (*VERDICTS, found)
    return StateSetMetricFamily(
        "fedsplit_lineage_verdict",
        "What the last closed round's lineage check found.",
        {verdict: verdict == found for verdict in known},
    )


def render(page: Mapping[str, Any]) -> bytes:
    """Return the OpenMetrics text of one page, UTF-8."""
    text: bytes = generate_latest(PageRegistry(page))  # type: ignore[no-untyped-call]
    return text


class MetricsPort:
    """HTTP server that answers with what ``body`` returns until it is closed.

    Args:
        port: to listen on; 0 = any free one.
        body: makes the body, called for every request.
        call_s: longest time for one caller.

    Raises:
        RunError: the port is taken.
    """

    def __init__(self, port: int, body: Callable[[], bytes], call_s: float = CALL_S) -> None:
        try:
            self._server = _Server((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            raise RunError(f"output.metrics-port={port}: must be free on {HOST}: {error}") from None
        self._server.body, self._server.call_s = body, call_s
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.2,), name="metrics", daemon=True
        )
        self._thread.start()

    @property
    def url(self) -> str:
        """Return where the metrics are."""
        return f"http://{HOST}:{self.port}/metrics"

    def close(self) -> None:
        """Free the port."""
        self._server.shutdown()
        self._server.server_close()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 2 * MOST_CALLERS
    body: Callable[[], bytes]
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
        body = self.server.body()
        self.send_response(200)
        self.send_header("Content-Type", CONTENT_TYPE_LATEST)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: a scrape is no event of the run."""
