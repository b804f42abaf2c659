"""One serving run at the server: load what training left, announce, answer until the time is up."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from flwr.app import Context, Message
from flwr.serverapp import Grid
from torch import Tensor

from fedsplit.config import RunConfig
from fedsplit.errors import ConfigError, ModelError
from fedsplit.models.adapters.trainable import make_trainable
from fedsplit.models.bundle.bottom import Bundle, pack_bottom
from fedsplit.models.bundle.head import with_head
from fedsplit.models.placing import place
from fedsplit.models.splitting.cached_decoding import check_cached_decoding
from fedsplit.models.splitting.halves import Bottom, split
from fedsplit.models.splitting.heads import Head, detach_head, positions_read
from fedsplit.privacy import build_mechanism
from fedsplit.privacy.labels.table import head_at_owner
from fedsplit.wire.authentication import Door
from fedsplit.wire.message_types import SERVE_TYPE
from fedsplit.wire.messages import WHO, SessionOffer
from fedsplit.wire.serving import MODE, ServingOffer
from fedsplit.wire.tokens import TokenBook

from ..rounds.recorder import Recorder
from ..sessions.setup import open_hub
from ..split_tuning.denoising import CohortDenoiser, build_denoiser
from ..split_tuning.run import AUTOCASTS, DTYPES, load_base, trained_without_head
from ..split_tuning.trained_weights import OWNERS, Trained, identity, load_trained
from .inference_server import Denoise, Desk, quiet

log = logging.getLogger(__name__)

POLL_S = 3.0


def build_desk(config: RunConfig) -> Desk:
    """Load the base and what training left, and return who answers.

    Raises:
        ConfigError: settings that cannot be served.
        ModelError: a checkpoint of another run, or a damaged one.
        UnsupportedModelError: a language model whose cache does not work across the cut.
    """
    transport = config.session.transport
    if transport != "stream":
        raise ConfigError(f"session.transport={transport!r}: must be stream to serve")
    loaded = load_base(config)
    bottom, top = split(loaded.model, config.split.k)
    head = detach_head(top) if head_at_owner(config.labels.protection) else None
    trainable = make_trainable(top, config.train.method)
    if head is not None:
        trainable = trained_without_head(trainable)
    if config.serving.weights:
        trained = load_trained(Path(config.serving.weights), identity(config, loaded.digest))
        trainable.load(trained.top)
        _load_owners(trained, bottom, head)
    bundle = pack_bottom(bottom, loaded.tokenizer)
    if head is not None:
        bundle = with_head(bundle, head)
    mechanism = build_mechanism(config.privacy, bottom, bottom.vocab)
    denoiser = build_denoiser(config, bottom, loaded.tokenizer, mechanism)
    place(top, config.model.device, DTYPES[config.model.dtype])
    top.autocast = AUTOCASTS[config.model.autocast]
    if config.model.task == "causal-lm":
        if head is not None or denoiser is not None:
            raise ConfigError(
                "serving of a causal-lm: must be without labels.protection=client-head and "
                "privacy.denoise (tokens are answered one by one)"
            )
        check_cached_decoding(bottom, top)
    return Desk(
        config,
        quiet(top),
        _files(bundle),
        positions="" if head is None else positions_read(head),
        denoise=None if denoiser is None else _once(denoiser),
    )


def _files(bundle: Bundle) -> tuple[dict[str, bytes], str]:
    return dict(bundle.files), bundle.digest


def _once(denoiser: CohortDenoiser) -> Denoise:
    """Return the denoiser without its memory: what is asked is not kept."""

    def denoise(rows: Sequence[Tensor]) -> list[Tensor]:
        return denoiser.once(rows)

    return denoise


def _load_owners(trained: Trained, bottom: Bottom, head: Head | None) -> None:
    """Put the averaged weights of what owners trained into the halves that are shipped."""
    known = dict(bottom.named_parameters())
    if head is not None:
        known |= {f"head.{name}": p for name, p in head.named_parameters()}
    for name, value in trained.owners.items():
        if name not in known or known[name].shape != value.shape:
            raise ModelError(f"checkpoint {OWNERS}{name}: no parameter of that name and shape")
        known[name].data.copy_(value)


class Announcer:
    """Sends every connected owner its leave to open sessions, and renews it.

    Args:
        grid: Flower's grid.
        door: issues the tokens.
        session: what every owner is told; the node is filled in.
        tokens: sessions per message.
        renew_s: seconds until an owner is sent new ones.
    """

    def __init__(
        self, grid: Grid, door: Door, session: SessionOffer, tokens: int, renew_s: float
    ) -> None:
        self._grid = grid
        self._door = door
        self._session = session
        self._tokens = tokens
        self._renew_s = renew_s
        self._told: dict[int, float] = {}
        self.owners: dict[int, str] = {}
        self.refused: dict[int, str] = {}

    def round(self, timeout_s: float) -> None:
        """Tell whoever has not been told, or not for ``renew_s`` seconds."""
        now = time.monotonic()
        due = [
            node
            for node in sorted(self._grid.get_node_ids())
            if now - self._told.get(node, -1e9) >= self._renew_s
        ]
        if not due:
            return
        messages = [
            Message(self._offer(node).to_content(), dst_node_id=node, message_type=SERVE_TYPE)
            for node in due
        ]
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

    def _offer(self, node: int) -> ServingOffer:
        run = self._door.run
        tokens = (self._door.tokens.issue(run, node, 0, MODE) for _ in range(self._tokens))
        session = replace(self._session, node=node)
        return ServingOffer(session, tuple(tokens))


def run(grid: Grid, context: Context, config: RunConfig) -> None:
    """Serve until the time is up (a row of ``strategies.STRATEGIES``)."""
    recorder = Recorder.of(config, context.run_id)
    desk = build_desk(config)
    door = Door(TokenBook(), context.run_id)
    hub, ca = open_hub(config.session, door, on_session=recorder.joined)
    hub.begin(desk)
    session = SessionOffer(
        run=door.run,
        node=0,
        round=0,
        mode=MODE,
        transport="stream",
        token="",
        address=hub.address,
        ca=ca,
        digest=desk.digest,
    )
    serving = config.serving
    announcer = Announcer(grid, door, session, serving.tokens, serving.renew_s)
    end = time.monotonic() + 60 * serving.minutes if serving.minutes else float("inf")
    log.info("serving %s at %s", config.model.name, hub.address)
    try:
        while time.monotonic() < end:
            announcer.round(config.session.deadline_s)
            recorder.write(status="running", **_told(desk, announcer))
            time.sleep(max(0.0, min(POLL_S, end - time.monotonic())))
        recorder.write(status="completed", **_told(desk, announcer))
    finally:
        hub.stop()
        desk.close()
        recorder.close()


def _told(desk: Desk, announcer: Announcer) -> dict[str, object]:
    report, forwards = desk.report, desk.batcher.report
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
