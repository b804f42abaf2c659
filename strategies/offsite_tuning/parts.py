"""What an offsite-tuning run's strategy works with, and how it is put together."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedsplit.config import RunConfig
from fedsplit.emulators import Emulator
from fedsplit.emulators.build import tune_in_full
from fedsplit.emulators.compression.structure import Model
from fedsplit.emulators.lm import mean_loss
from fedsplit.emulators.settings import check_offsite, method_settings
from fedsplit.models.adapters.methods import BlockTuning
from fedsplit.models.loading import LoadedModel
from fedsplit.wire.messages import weights_record

from ..base_model import load_base
from ..rounds.averaging import make_averaging, restore, state_of
from ..rounds.lineage_setup import build_watch
from ..rounds.lineage_watch import LineageWatch
from ..rounds.recorder import Recorder
from ..sessions.setup import open_transport
from ..sessions.transports import StreamTransport
from .emulator import public_blocks, shipped_emulator
from .export import keep_adapters, keep_averaging, kept_adapters, kept_averaging
from .file_server import FileServer

log = logging.getLogger(__name__)


@dataclass
class OffsiteParts:
    """What a run's strategy works with.

    Attributes:
        loaded: the full model; adapters are plugged into it after every round.
        emulator: what owners train.
        tuning: what is trained, in A of the full model.
        digest: of the emulator's files.
        public: held-out public blocks (N, T) that the plugged-in model is evaluated on.
        stream: the session server.
        files: hands out the emulator.
        watch: the lineage gate.
        recorder: writes what happened.
        averaging: Flower strategy that averages.
        keep: called with (round, adapters) after every accepted round, for crashes to lose little.
        first: rounds that an earlier, interrupted start of the same run has done.
    """

    loaded: LoadedModel
    emulator: Emulator
    tuning: BlockTuning
    digest: str
    public: Tensor
    stream: StreamTransport
    files: FileServer
    watch: LineageWatch
    recorder: Recorder
    averaging: Strategy
    keep: Callable[[int, dict[str, Tensor]], None]
    first: int = 0

    @property
    def model(self) -> Model:
        """The full model."""
        return self.loaded.model

    def adapters(self) -> ArrayRecord:
        """Return the adapters as they are plugged in."""
        state = self.tuning.state()
        return weights_record({n: np.asarray(t.float().numpy()) for n, t in state.items()})

    def close(self) -> None:
        """Close all sessions and the port."""
        self.stream.close()


def build_parts(
    config: RunConfig,
    run_id: int,
    recorder: Recorder,
    folder: Path,
    averaging: Strategy | None = None,
) -> OffsiteParts:
    """Load the model, build or find the emulator, and open the session server.

    Args:
        config: the run's settings.
        run_id: Flower's.
        recorder: writes what happened.
        folder: of the run's files.
        averaging: Flower strategy that averages; None: as the settings say.

    Raises:
        ConfigError, ModelError, LineageError, SessionError: settings or material that cannot be
            used.
    """
    check_offsite(config.offsite)
    loaded = load_base(config)
    tokens, public = public_blocks(config, loaded.tokenizer)
    shipped = shipped_emulator(config, loaded, tokens, folder)
    emulator, digest = shipped.emulator, shipped.digest
    facts = shipped.facts | {
        "method": config.offsite.method,
        "full_parameters": sum(p.numel() for p in loaded.model.parameters()),
    }
    recorder.write(
        base_digest=loaded.digest,
        emulator=facts,
        full_zero_shot_loss=mean_loss(loaded.model, public),
        emulator_zero_shot_loss=mean_loss(emulator.model, public),
        config=json.loads(json.dumps(config.to_flat())),
    )
    watch = build_watch(config.lineage, folder, owners=loaded.model)  # before modules are added
    settings = method_settings(config.offsite, config.seed)
    tuning = tune_in_full(loaded.model, emulator.plan, settings)
    facts["trained_parameters"] = tuning.count()
    facts["trained_share"] = tuning.count() / facts["full_parameters"]
    recorder.write(emulator=facts)
    averaging = averaging or make_averaging(config.offsite)
    first = 0
    if (kept := kept_adapters(folder, digest, settings)) is not None:
        first, state = kept
        tuning.load(state)
        restore(averaging, kept_averaging(folder, first, digest))
        log.info("going on after round %d of an interrupted run", first)
    files = FileServer(shipped.files(), digest, config.session.deadline_s)
    stream = open_transport(config.session, run_id, on_session=recorder.joined)
    stream.serve(files)

    def keep(number: int, state: dict[str, Tensor]) -> None:
        keep_averaging(folder, number, state_of(averaging), digest)
        keep_adapters(folder, number, state, digest, settings)

    return OffsiteParts(
        loaded=loaded,
        emulator=emulator,
        tuning=tuning,
        digest=digest,
        public=public,
        stream=stream,
        files=files,
        watch=watch,
        recorder=recorder,
        averaging=averaging,
        keep=keep,
        first=first,
    )
