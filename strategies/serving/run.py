"""One serving run at the server: load what training left, announce, answer until the time is up."""

from __future__ import annotations

import logging
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from flwr.app import Context, Message
from flwr.serverapp import Grid

from fedsplit.config import RunConfig
from fedsplit.errors import ConfigError
from fedsplit.models.splitting.cached_decoding import check_cached_decoding
from fedsplit.models.trained.weights import identity, load_trained
from fedsplit.tasks import task_of
from fedsplit.wire.message_types import SERVE_TYPE
from fedsplit.wire.messages import WHO, SessionOffer
from fedsplit.wire.serving import MODE, ServingOffer

from ..rounds.recorder import Recorder
from ..sessions.setup import open_transport
from ..sessions.transports import StreamTransport
from ..split_tuning.model import assemble, load_halves
from .inference_server import InferenceServer

log = logging.getLogger(__name__)

POLL_S = 3.0


def build_inference_server(config: RunConfig) -> InferenceServer:
    """Load the base and what training left, and return who answers.

    Raises:
        ConfigError: settings that cannot be served.
        ModelError: a checkpoint of another run, or a damaged one.
        UnsupportedModelError: a language model whose cache does not work across the cut.
    """
    transport = config.session.transport
    if transport != "stream":
        raise ConfigError(f"session.transport={transport!r}: must be stream to serve")
    halves = load_halves(config)
    trained = None
    if config.serving.weights:
        trained = load_trained(Path(config.serving.weights), identity(config, halves.digest))
    model = assemble(config, halves, trained)
    if not task_of(config).labelled:
        if model.head is not None or model.denoise is not None:
            raise ConfigError(
                f"serving of a {config.model.task}: must be without "
                "labels.protection=client-head and privacy.denoise (tokens are answered one by one)"
            )
        check_cached_decoding(halves.bottom, model.top)
    return InferenceServer(config, model)


class Announcer:
    """Tells every connected owner how to open sessions, and renews the tokens for them.

    Args:
        grid: Flower's grid.
        stream: where owners connect.
        server: what answers them.
    """

    def __init__(self, grid: Grid, stream: StreamTransport, server: InferenceServer) -> None:
        self._grid = grid
        self._tokens = stream.authenticator
        self._config, self._names = server.config, server.names
        self._offer = SessionOffer(
            run=stream.authenticator.run,
            node=0,  # and the tokens: filled in for each owner
            round=0,
            mode=MODE,
            transport="stream",
            token="",
            address=stream.address,
            ca=stream.ca,
            digest=server.digest,
        )
        self._told: dict[int, float] = {}
        self.owners: dict[int, str] = {}
        self.refused: dict[int, str] = {}

    def announce(self) -> None:
        """Tell whoever has not been told, or not for ``serving.renew-s`` seconds."""
        now, renew_s = time.monotonic(), self._config.serving.renew_s
        due = [
            node
            for node in self._names.connected(self._grid)
            if now - self._told.get(node, -1e9) >= renew_s
        ]
        if not due:
            return
        messages = [
            Message(self._offer_to(node).to_content(), dst_node_id=node, message_type=SERVE_TYPE)
            for node in due
        ]
        timeout_s = self._config.session.deadline_s
        for reply in self._grid.send_and_receive(messages, timeout=timeout_s):
            node = reply.metadata.src_node_id
            self._told[node] = now
            if reply.has_error():
                self.refused[node] = str(reply.error.reason)
                log.warning("owner at node %d: %s", node, reply.error.reason)
                continue
            self.refused.pop(node, None)
            who = reply.content.config_records.get(WHO)
            self.owners[node] = str(who.get("owner", node)) if who is not None else str(node)

    def _offer_to(self, node: int) -> ServingOffer:
        count = self._config.serving.tokens
        tokens = (self._tokens.issue(node, 0, MODE) for _ in range(count))
        return ServingOffer(replace(self._offer, node=node), tuple(tokens))


def run(grid: Grid, context: Context, config: RunConfig) -> None:
    """Serve until the time is up (a row of ``strategies.STRATEGIES``)."""
    minutes = config.serving.minutes
    with (
        Recorder.open(config, context.run_id) as recorder,
        closing(build_inference_server(config)) as server,
        closing(
            open_transport(config.session, context.run_id, on_session=recorder.session_opened)
        ) as stream,
    ):
        stream.serve(server)
        announcer = Announcer(grid, stream, server)
        end = time.monotonic() + 60 * minutes if minutes else float("inf")
        log.info("serving %s at %s", config.model.name, stream.address)
        while time.monotonic() < end:
            announcer.announce()
            recorder.write(status="running", **_told(server, announcer))
            time.sleep(max(0.0, min(POLL_S, end - time.monotonic())))
        recorder.write(status="completed", **_told(server, announcer))


def _told(server: InferenceServer, announcer: Announcer) -> dict[str, object]:
    report, forwards = server.report, server.batcher.report
    return {
        "serving": {
            "owners": sorted(announcer.owners.values()),
            "refused": {str(k): v for k, v in announcer.refused.items()},
            "sessions": report.sessions,
            "failed": report.failed,
            "texts": report.texts,
            "tokens": report.tokens,
            "forwards": forwards.forwards,
            "texts_per_forward": forwards.texts / forwards.forwards if forwards.forwards else 0.0,
            "compute_s": forwards.compute_s,
        }
    }
