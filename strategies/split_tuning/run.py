"""One split-tuning run at the server: load, split, serve, start, write the end."""

from __future__ import annotations

import logging
import resource
import time
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid

from fedsplit.config import RunConfig
from fedsplit.models.adapters.trainable import Trainable, make_trainable
from fedsplit.models.anatomy import probe
from fedsplit.models.bundle.bottom import pack_bottom
from fedsplit.models.bundle.head import with_head
from fedsplit.models.loading import LoadedModel, load
from fedsplit.models.placing import place
from fedsplit.models.splitting.halves import Bottom, split
from fedsplit.models.splitting.heads import Head, detach_head, head_parameters, positions_read
from fedsplit.privacy import build_mechanism
from fedsplit.privacy.labels.table import head_at_owner
from fedsplit.seeding import derive_seed
from fedsplit.settings import check_settings
from fedsplit.wire.authentication import Door
from fedsplit.wire.messages import weights_record
from fedsplit.wire.tokens import TokenBook

from ..rounds.lineage_setup import build_watch
from ..rounds.recorder import Recorder
from ..sessions.setup import open_hub
from .denoising import build_denoiser
from .optimisation import Optimisation
from .parts import ServerParts
from .run_checkpoint import FOLDER, earlier_content, open_state
from .strategy import SplitTuning
from .trained_weights import FILE, identity, save_trained

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PLAIN_TOKENS = 512
AUTOCASTS = {"off": None, "bfloat16": torch.bfloat16}


def load_base(config: RunConfig) -> LoadedModel:
    """Load the base model as the settings say; the same for the server and a baseline.

    Raises:
        ModelError, UnsupportedModelError, ConfigError: see :func:`fedsplit.models.loading.load`.
    """
    m = config.model
    # The fused kernel's backward is slow in bfloat16 on a CPU; plain attention of T x T is not.
    plain = m.autocast == "bfloat16" and m.device == "cpu" and m.max_tokens <= PLAIN_TOKENS
    return load(
        m.name,
        m.task,
        attn="eager" if plain else None,
        num_labels=m.labels if m.task == "sequence-classification" else None,
        dtype=DTYPES[m.dtype],
        seed=derive_seed(config.seed, "head"),
        dropout=None if m.dropout < 0 else m.dropout,
        expected_sha256=m.sha256 or None,
    )


def build_parts(config: RunConfig, run_id: int, recorder: Recorder) -> tuple[ServerParts, Bottom]:
    """Load and split the model, choose what is trained, open the session server."""
    loaded = load_base(check_settings(config))
    bottom, top = split(loaded.model, config.split.k)
    bundle = pack_bottom(bottom, loaded.tokenizer)
    head: Head | None = None
    if head_at_owner(config.labels.protection):
        head = detach_head(top)
        bundle = with_head(bundle, head)
    embedding = probe(bottom.model).input_embeddings
    rows = next(embedding.parameters()).detach()
    watch = build_watch(
        config.lineage,
        Path(config.output.dir) if config.output.dir else None,
        model=top.model,
        rows=rows,
        owners=bottom if config.split.bottom == "joint" else None,
    )
    frozen = config.split.bottom == "frozen"
    mechanism = build_mechanism(
        config.privacy, bottom, bottom.vocab, loaded.tokenizer, frozen=frozen
    )
    denoise = build_denoiser(config, bottom, loaded.tokenizer, mechanism)
    trainable = make_trainable(top, config.train.method)
    if head_at_owner(config.labels.protection):
        trainable = trained_without_head(trainable)
    place(top, config.model.device, DTYPES[config.model.dtype])
    top.autocast = AUTOCASTS[config.model.autocast]
    fresh = head_parameters(top) if config.model.task == "sequence-classification" else set()
    parameters = trainable.parameters()
    optimisation = Optimisation(
        [p for p in parameters if id(p) not in fresh],
        [p for p in parameters if id(p) in fresh],
        config.train,
    )
    door = Door(TokenBook(), run_id)
    hub, ca = None, b""
    if config.session.transport == "stream":
        hub, ca = open_hub(
            config.session,
            door,
            on_bytes=recorder.on_bytes if config.output.capture else None,
            reconnect_s=config.session.reconnect_s,
        )
    recorder.write(
        base_digest=loaded.digest,
        bottom_digest=bundle.digest,
        bottom_bytes=sum(len(b) for b in bundle.files.values()),
        trainable_share=trainable.share,
        trained_parameters=sum(p.numel() for p in parameters),
    )
    parts = ServerParts(
        top=top,
        trainable=trainable,
        optimisation=optimisation,
        bundle=(dict(bundle.files), bundle.digest),
        door=door,
        watch=watch,
        recorder=recorder,
        hub=hub,
        ca=ca,
        denoise=denoise,
        positions="" if head is None else positions_read(head),
        head=head,
    )
    return parts, bottom


def trained_without_head(trainable: Trainable) -> Trainable:
    """Return what the server trains where the head is the owners'."""
    head = head_parameters(trainable.top)
    for parameter in trainable.parameters():
        parameter.requires_grad_(id(parameter) not in head)
    return Trainable(trainable.top, trainable.method)


def initial_arrays(config: RunConfig, bottom: Bottom, head: Head | None = None) -> ArrayRecord:
    """Return what Flower's start() begins with: the weights that owners train and it averages.

    Args:
        config: the run's settings.
        bottom: as owners receive it.
        head: the same, where it is theirs.
    """
    named: list[tuple[str, torch.nn.Parameter]] = []
    if config.split.bottom == "joint":
        named += bottom.named_parameters()
    classify = config.model.task == "sequence-classification"
    if head is not None and (classify or config.train.method == "all"):
        named += [(f"head.{name}", p) for name, p in head.named_parameters()]
    return weights_record(
        {n: p.detach().float().numpy() for n, p in named if p.is_floating_point()}
    )


def keep_trained(config: RunConfig, parts: ServerParts, arrays: ArrayRecord | None) -> None:
    """Leave what was trained in ``output.dir``, unless ``output.save`` is off.

    Raises:
        RunError: it cannot be written.
    """
    if config.output.dir and config.output.save:
        belongs = identity(config, str(parts.recorder.content["base_digest"]))
        save_trained(Path(config.output.dir) / FILE, parts.trainable.state(), arrays, belongs)


def run(grid: Grid, context: Context, config: RunConfig) -> None:
    """Carry out the whole run (a row of ``strategies.STRATEGIES``)."""
    recorder = Recorder.of(config, context.run_id)
    if config.output.dir and (Path(config.output.dir) / FOLDER).exists():
        recorder.content |= earlier_content(Path(config.output.dir))
    began = time.perf_counter()
    if config.output.threads:
        torch.set_num_threads(config.output.threads)
    parts, bottom = build_parts(config, context.run_id, recorder)
    state = None
    try:
        strategy = SplitTuning(config, parts)
        state = open_state(config, parts, strategy.store, strategy.averaging)
        if state is not None:
            strategy.resume(state)
        initial = strategy.keeping.arrays or initial_arrays(config, bottom, parts.head)
        del bottom
        recorder.write(setup_s=time.perf_counter() - began, status="running")
        left = config.train.rounds - strategy.keeping.first
        if left > 0:
            strategy.start(grid, initial, num_rounds=left, timeout=config.session.round_s)
        keep_trained(config, parts, strategy.keeping.arrays)
        if config.output.transcript:
            recorder.transcript(strategy.store)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux
        recorder.write(status="completed", run_s=time.perf_counter() - began, peak_rss_bytes=peak)
        if state is not None:
            state.folder.clear()  # there is nothing left to go on with
    except BaseException as error:
        recorder.content["status"] = "failed"
        recorder.content["error"] = f"{type(error).__name__}: {error}"
        recorder.write()
        raise
    finally:
        if state is not None:
            state.folder.close()
        if parts.hub is not None:
            parts.hub.stop()
        recorder.close()
