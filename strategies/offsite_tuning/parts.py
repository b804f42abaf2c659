"""What an offsite-tuning run's strategy works with, and how it is put together."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord
from torch import Tensor

from fedsplit.config import RunConfig
from fedsplit.emulators import Emulator
from fedsplit.emulators.build import tune_in_full
from fedsplit.emulators.compression.structure import Model
from fedsplit.emulators.lm import mean_loss
from fedsplit.emulators.settings import check_offsite, method_settings
from fedsplit.errors import ModelError
from fedsplit.models.adapters.methods import BlockTuning, MethodSettings, check_method
from fedsplit.models.anatomy import probe
from fedsplit.models.loading import LoadedModel
from fedsplit.models.placing import device_of
from fedsplit.wire.messages import weights_record

from ..base_model import load_base
from ..rounds.aggregate import tensors
from ..rounds.lineage_setup import build_watch
from ..rounds.lineage_watch import LineageWatch
from ..rounds.recorder import Recorder
from ..rounds.run_checkpoint import below
from ..sessions.setup import open_transport
from ..sessions.transports import StreamTransport
from .emulator import public_blocks, shipped_emulator
from .export import refuse_first_version, save_adapters
from .file_server import FileServer
from .flights import Flights


@dataclass
class OffsiteParts:
    """What a run's strategy works with.

    Attributes:
        loaded: the full model, on ``model.device``; adapters are plugged into it after every round.
        emulator: what owners train.
        tuning: what is trained, in A of the full model.
        digest: of the emulator's files.
        public: held-out public blocks (N, T) that the plugged-in model is evaluated on.
        stream: the session server.
        files: hands out the emulator.
        watch: the lineage gate.
        recorder: writes what happened.
        folder: of the run's files.
        settings: of the adapter method.
        flights: owners at work while rounds go on, or None.
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
    folder: Path
    settings: MethodSettings
    flights: Flights | None = None

    @property
    def model(self) -> Model:
        """The full model."""
        return self.loaded.model

    def adapters(self) -> ArrayRecord:
        """Return the adapters as they are plugged in."""
        state = self.tuning.state()
        return weights_record({n: np.asarray(t.float().numpy()) for n, t in state.items()})

    def public_loss(self, adapters: ArrayRecord) -> float:
        """Return the loss (nats) on public text with these adapters; infinite if they do not fit.

        What is plugged in stays as it is.
        """
        before = self.tuning.state()
        try:
            self.tuning.load(tensors(adapters))
            return mean_loss(self.model, self.public)
        except ModelError:
            return math.inf
        finally:
            self.tuning.load(before)

    def plug_in(self, number: int, adapters: dict[str, Tensor]) -> None:
        """Put a round's averaged adapters into the full model, and write them.

        Raises:
            RunError: they cannot be written.
        """
        self.tuning.load(adapters)
        save_adapters(self.folder, number, adapters, self.digest, self.settings)

    def digests(self) -> dict[str, str]:
        """Return the digests of what a saved state belongs to."""
        return {"base": self.loaded.digest, "emulator": self.digest}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return who is at work and from what, for a saved state; the server trains nothing."""
        return ({}, {}) if self.flights is None else self.flights.state()

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Plug in the adapters of a saved state.

        Raises:
            ModelError: they do not fit the model.
        """
        if adapters := below("owners", tensors):
            self.tuning.load(adapters)
        if self.flights is not None:
            self.flights.restore(tensors, facts)

    def as_base(self, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what adapters make of the base's own tensors (LoRA's factors, say)."""
        return self.tuning.dense(arrays)

    def close(self) -> None:
        """Close all sessions and the port."""
        self.stream.close()


def build_parts(config: RunConfig, run_id: int, recorder: Recorder, folder: Path) -> OffsiteParts:
    """Load the model, build or find the emulator, and open the session server.

    Args:
        config: the run's settings.
        run_id: Flower's.
        recorder: writes what happened.
        folder: of the run's files.

    Raises:
        ConfigError, ModelError, LineageError, SessionError: settings or material that cannot be
            used.
        RunError: the folder holds adapters of the first version.
    """
    refuse_first_version(folder)
    check_offsite(config.offsite)
    device = device_of(config.model.device, "model.device")
    settings = method_settings(config.offsite, config.seed)
    loaded = load_base(config)
    check_method(probe(loaded.model).blocks, settings)  # before the work of an emulator
    loaded.model.to(device)  # type: ignore[arg-type]
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
    tuning = tune_in_full(loaded.model, emulator.plan, settings)
    watch.expect({name: t.float() for name, t in tuning.state().items()})
    facts["trained_parameters"] = tuning.count()
    facts["trained_share"] = tuning.count() / facts["full_parameters"]
    recorder.write(emulator=facts)
    files = FileServer(shipped.files(), digest, config.session.deadline_s)
    stream = open_transport(config.session, run_id, on_session=recorder.session_opened)
    stream.serve(files)
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
        folder=folder,
        settings=settings,
        flights=Flights(config.buffer, config.seed) if config.buffer.size else None,
    )
