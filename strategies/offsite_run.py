"""One offsite-tuning run at the server: build the emulator, average, plug in, export.

``output.dir`` gets ``emulator/`` (what owners were sent), ``importance/`` (reused when it is of the
same base), ``adapters.safetensors`` after every round (an interrupted run goes on from there) and,
at the end, ``adapter/`` and ``model/`` (see :mod:`strategies.offsite_export`).
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid
from torch import Tensor

from fedsplit.config import OffsiteConfig, RunConfig
from fedsplit.emulators import Emulator, Material, make_compressor
from fedsplit.emulators.build import method_settings, tune_in_full
from fedsplit.emulators.files import folder_digest, save_emulator
from fedsplit.emulators.importance import LayerReplace
from fedsplit.emulators.importance_files import Importance, ImportanceSettings
from fedsplit.emulators.lm import mean_loss, pack
from fedsplit.errors import ConfigError
from fedsplit.models.loading import LoadedModel
from fedsplit.privacy.public_text import public_texts
from fedsplit.seeding import derive_seed
from fedsplit.wire.door import Door
from fedsplit.wire.messages import weights_record
from fedsplit.wire.tokens import TokenBook
from strategies.averaging import make_averaging, restore, state_of
from strategies.file_desk import FileDesk
from strategies.hub import StreamHub
from strategies.lineage_setup import build_watch
from strategies.offsite_export import (
    export,
    keep_adapters,
    keep_averaging,
    kept_adapters,
    kept_averaging,
)
from strategies.offsite_tuning import OffsiteParts, OffsiteTuning
from strategies.recorder import Recorder
from strategies.split_tuning import LONG_S
from strategies.split_tuning_run import load_base, server_tls

log = logging.getLogger(__name__)


def public_blocks(config: RunConfig, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Return (calibration, evaluation) blocks (N, T) of the server's public text.

    Raises:
        DataError: less than two blocks.
    """
    texts = public_texts(config.offsite.public, docstrings=config.data.kind != "docstrings")
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, add_special_tokens=False)["input_ids"]
    blocks = pack(torch.tensor(ids, dtype=torch.int64), config.offsite.block)
    held = max(1, min(64, len(blocks) // 8))
    return blocks[held:], blocks[:held]


def importance_for(
    config: RunConfig, loaded: LoadedModel, tokens: Tensor, folder: Path | None
) -> Importance | None:
    """Return the importance run that the compressor needs, resumed or new, or None."""
    o = config.offsite
    if o.compressor != "scaleot" or (o.alpha == 0 and o.chosen):
        return None
    settings = ImportanceSettings(
        steps=o.importance_steps, seed=derive_seed(config.seed, "importance") % 2**31
    )
    half = max(1, len(tokens) // 2)
    resume = folder if folder is not None and (folder / "importance.json").exists() else None
    run = LayerReplace(
        loaded.model,
        tokens[:half],
        tokens[half:] if half < len(tokens) else tokens,
        settings,
        base_digest=loaded.digest,
        resume=resume,
    )
    return run.run(checkpoint=folder)


def compressor_settings(o: OffsiteConfig, layers: int) -> dict[str, Any]:
    """Return the compressor's own settings from the run's.

    Raises:
        ConfigError: a compressor that has no choice of blocks was given none.
    """
    if o.compressor == "scaleot":
        where: dict[str, Any] = {"adapters": o.chosen} if o.chosen else {"n_adapters": o.adapters}
        return {
            **where,
            "alpha": o.alpha,
            "beta": o.beta,
            "rank_by": o.rank_by,
            "settle_steps": o.settle_steps,
        }
    chosen = o.chosen
    if not chosen:
        half = max(1, o.adapters // 2)
        chosen = tuple(sorted({*range(half), *range(layers - (o.adapters - half), layers)}))
    own: dict[str, dict[str, Any]] = {
        "layerdrop": {"keep": o.keep, "distil_steps": o.settle_steps},
        "crash": {"clusters": o.keep},
        "gradot": {"attention": o.beta, "ffn": o.beta},
        "magnitude": {"sparsity": o.beta},
        "quantised": {},
    }
    if o.compressor not in own:
        known = ", ".join(sorted([*own, "scaleot"]))
        raise ConfigError(f"offsite.compressor={o.compressor!r}: must be one of {known}")
    return {"adapters": chosen, **own[o.compressor]}


def make_emulator(
    config: RunConfig, loaded: LoadedModel, tokens: Tensor, folder: Path | None
) -> tuple[Emulator, dict[str, Any]]:
    """Return the emulator and what building it took."""
    began = time.perf_counter()
    importance = importance_for(config, loaded, tokens, folder)
    scored = time.perf_counter()
    layers = int(loaded.model.config.num_hidden_layers)
    made = make_compressor(config.offsite.compressor, **compressor_settings(config.offsite, layers))
    material = Material(tokens=tokens, importance=importance, base_digest=loaded.digest)
    emulator = made.build(loaded.model, material)
    return emulator, {
        "importance_s": scored - began,
        "build_s": time.perf_counter() - scored,
        "emulator_parameters": emulator.parameter_count(),
        "adapter_parameters": emulator.trainable_count(),
        "adapters": list(emulator.plan.adapters),
        "roles": list(emulator.plan.roles),
        "scores": list(importance.scores) if importance is not None else None,
    }


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
                strategy.start(grid, initial, num_rounds=left, timeout=LONG_S)
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
    emulator, facts = make_emulator(config, loaded, tokens, folder / "importance")
    shipped = folder / "emulator"
    shutil.rmtree(shipped, ignore_errors=True)
    saved = save_emulator(emulator, shipped, tokenizer=loaded.tokenizer)
    digest = folder_digest(shipped)
    facts |= {
        "digest": digest,
        "bytes": saved.bytes,
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
    tls, ca = server_tls()
    desk = FileDesk(_files(shipped), digest, config.session.deadline_s)
    hub = StreamHub(
        door,
        host=config.session.host,
        port=config.session.port,
        tls=tls,
        max_frame_bytes=config.session.max_frame_mb << 20,
        on_bytes=None,
        on_session=recorder.joined,
    )
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
