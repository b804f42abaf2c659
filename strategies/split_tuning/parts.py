"""What a split-tuning run's strategy works with, and how it is put together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord
from torch import Tensor

from fedsplit.config import RunConfig
from fedsplit.errors import ModelError, RunError
from fedsplit.models.anatomy import probe
from fedsplit.models.splitting.heads import head_parameters
from fedsplit.tasks import task_of
from fedsplit.wire.authentication import SessionAuthenticator
from fedsplit.wire.messages import weights_record

from ..rounds.lineage_setup import build_watch
from ..rounds.lineage_watch import LineageWatch
from ..rounds.recorder import Recorder
from ..rounds.run_checkpoint import below, under
from ..sessions.setup import open_transport
from ..sessions.transports import StreamTransport
from .model import SplitModel, assemble, load_halves, owners_parameters, top_rows
from .optimisation import Optimisation
from .replicas import Replicas
from .top_step import Forward, ForwardHere


@dataclass
class ServerParts:
    """What a run's strategy works with.

    Attributes:
        model: the cut model, its trainable part chosen.
        forward: computes with the top, in one process or several.
        optimisation: the optimizer of that part.
        initial: what owners train and the server averages, as it starts; often empty.
        authenticator: admits sessions of this run.
        watch: checks the lineage of what owners return and of each aggregate.
        recorder: writes what happened.
        stream: the session server, or None for ``session.transport = "messages"``.
    """

    model: SplitModel
    forward: Forward
    optimisation: Optimisation
    initial: ArrayRecord
    authenticator: SessionAuthenticator
    watch: LineageWatch
    recorder: Recorder
    stream: StreamTransport | None

    def digests(self) -> dict[str, str]:
        """Return the digests of what a saved state belongs to."""
        return {"base": self.model.base_digest, "bottom": self.model.bundle.digest}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the trained part of the top and its optimizer's memory, for a saved state."""
        tensors, numbers = self.optimisation.state()
        trained = under("top", self.model.trainable.state())
        return {**trained, **under("optimizer", tensors)}, {"numbers": numbers}

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Go on from :meth:`state`.

        Raises:
            ModelError: it does not fit the model.
        """
        self.model.trainable.load(below("top", tensors))
        self.optimisation.load(below("optimizer", tensors), facts["numbers"])

    def as_base(self, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what the owners' weights make of the base's own tensors: they are these."""
        return dict(arrays)

    def close(self) -> None:
        """Close all sessions and the port."""
        if self.stream is not None:
            self.stream.close()
        self.forward.close()


def build_parts(config: RunConfig, run_id: int, recorder: Recorder) -> ServerParts:
    """Load and split the model, choose what is trained, open the session server.

    Raises:
        ConfigError, ModelError, LineageError, PrivacyError, SessionError: settings or material
            that cannot be used.
    """
    halves = load_halves(config)
    embedding = probe(halves.bottom.model).input_embeddings
    watch = build_watch(
        config.lineage,
        Path(config.output.dir) if config.output.dir else None,
        model=halves.top.model,
        rows=next(embedding.parameters()).detach(),
        owners=halves.bottom if config.split.bottom == "joint" else None,
    )
    model = assemble(config, halves)
    fresh = head_parameters(model.top) if task_of(config).labelled else set()
    parameters = model.trainable.parameters()
    if not parameters and not model.tail:
        raise ModelError("top has 0 trainable parameters: must be >= 1")
    optimisation = Optimisation(
        [p for p in parameters if id(p) not in fresh],
        [p for p in parameters if id(p) in fresh],
        config.train,
    )
    owners = owners_parameters(config, halves.bottom, halves.head)
    initial = weights_record({n: p.detach().float().numpy() for n, p in owners.items()})
    top = model.trainable.state()
    new = {n for n, p in model.trainable.named_parameters() if id(p) in fresh}
    begun = {n: p.detach().float().cpu().clone() for n, p in owners.items()}
    watch.expect(begun, top, frozenset(new))
    authenticator, stream = SessionAuthenticator(run_id), None
    if config.session.transport == "stream":
        stream = open_transport(
            config.session,
            run_id,
            on_bytes=recorder.on_bytes,
            reconnect_s=config.session.reconnect_s,
        )
        authenticator = stream.authenticator
    recorder.write(
        base_digest=model.base_digest,
        bottom_digest=model.bundle.digest,
        bottom_bytes=sum(len(b) for b in model.bundle.files.values()),
        trainable_share=model.trainable.share,
        trained_parameters=sum(p.numel() for p in parameters),
    )
    try:
        forward = open_forward(config, model)
    except RunError:
        if stream is not None:
            stream.close()
        raise
    return ServerParts(
        model, forward, optimisation, initial, authenticator, watch, recorder, stream
    )


def open_forward(config: RunConfig, model: SplitModel) -> Forward:
    """Return what computes with the top, as ``server.*`` says.

    Raises:
        RunError: a worker does not start.
    """
    rows = top_rows(config, model.top, model.head)
    if config.server.workers == 1:
        return ForwardHere(rows)
    return Replicas(rows, config)
