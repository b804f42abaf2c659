"""One offsite-tuning run at the server: build the emulator, average, plug in, export.

``output.dir`` gets ``emulator/`` and ``importance/`` (see
:mod:`strategies.offsite_tuning.emulator`),
``adapters.safetensors`` after every round (an interrupted run goes on from there) and, at the end,
``adapter/`` and ``model/`` (see :mod:`strategies.offsite_tuning.export`).
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid
from torch import Tensor

from fedsplit.config import RunConfig
from fedsplit.emulators.build import tune_in_full
from fedsplit.emulators.lm import mean_loss
from fedsplit.emulators.settings import method_settings
from fedsplit.errors import ConfigError
from fedsplit.models.loading import LoadedModel
from fedsplit.wire.authentication import Door
from fedsplit.wire.messages import weights_record
from fedsplit.wire.tokens import TokenBook

from ..rounds.averaging import make_averaging, restore, state_of
from ..rounds.lineage_setup import build_watch
from ..rounds.recorder import Recorder
from ..sessions.setup import open_hub
from ..split_tuning.run import load_base
from .emulator import public_blocks, shipped_emulator
from .export import export, keep_adapters, keep_averaging, kept_adapters, kept_averaging
from .file_server import FileDesk
from .strategy import OffsiteParts, OffsiteTuning

log = logging.getLogger(__name__)


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def run(grid: Grid, context: Context, config: RunConfig) -> None:
    """Carry out the whole run (a row of ``strategies.STRATEGIES``)."""
    if config.model.task != "causal-lm" or config.session.transport != "stream":
        raise ConfigError(
            f"model.task={config.model.task!r}, session.transport={config.session.transport!r}: "
            "must be causal-lm and stream for offsite tuning"
        )
    folder = Path(config.output.dir) if config.output.dir else None
    recorder = Recorder.of(config, context.run_id)
    began = time.perf_counter()
    if config.output.threads:
        torch.set_num_threads(config.output.threads)
    loaded = load_base(config)
    with tempfile.TemporaryDirectory() as scratch:
        parts, first = _parts(config, context, recorder, loaded, folder or Path(scratch))
        recorder.write(status="running", setup_s=time.perf_counter() - began)
        try:
            strategy = OffsiteTuning(config, parts, first)
            state = parts.tuning.state()
            initial: ArrayRecord = weights_record(
                {n: np.asarray(t.float().numpy()) for n, t in state.items()}
            )
            left = config.train.rounds - first
            if left > 0:
                strategy.start(grid, initial, num_rounds=left, timeout=config.session.round_s)
            if folder is not None and config.output.save:
                recorder.write(exported=export(folder, loaded, parts.tuning))
            recorder.write(status="completed", run_s=time.perf_counter() - began)
        except BaseException as error:
            recorder.content["status"] = "failed"
            recorder.content["error"] = f"{type(error).__name__}: {error}"
            recorder.write()
            raise
        finally:
            parts.hub.stop()
            recorder.close()


def _parts(
    config: RunConfig, context: Context, recorder: Recorder, loaded: LoadedModel, folder: Path
) -> tuple[OffsiteParts, int]:
    """Return the strategy's parts, and how many rounds an interrupted start had done."""
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
    first, averaging = 0, make_averaging(config.offsite)
    if (kept := kept_adapters(folder, digest, settings)) is not None:
        first, state = kept
        tuning.load(state)
        restore(averaging, kept_averaging(folder, first, digest))
        log.info("going on after round %d of an interrupted run", first)
    door = Door(TokenBook(), context.run_id)
    desk = FileDesk(_files(shipped.folder), digest, config.session.deadline_s)
    hub, ca = open_hub(config.session, door, on_session=recorder.joined)
    hub.begin(desk)

    def keep(number: int, state: dict[str, Tensor]) -> None:
        keep_averaging(folder, number, state_of(averaging), digest)
        keep_adapters(folder, number, state, digest, settings)

    return (
        OffsiteParts(
            model=loaded.model,
            emulator=emulator,
            tuning=tuning,
            digest=digest,
            public=public,
            door=door,
            hub=hub,
            desk=desk,
            watch=watch,
            recorder=recorder,
            averaging=averaging,
            keep=keep,
            ca=ca,
        ),
        first,
    )
