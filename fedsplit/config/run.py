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
from dataclasses import dataclass, field, fields
from typing import Any, TypeAlias

from fedsplit.config.buffer import BufferConfig
from fedsplit.config.groups import (
    DataConfig,
    LineageConfig,
    ModelConfig,
    OutputConfig,
    SessionConfig,
    SplitConfig,
    TrainConfig,
)
from fedsplit.config.labels import DpConfig, LabelsConfig
from fedsplit.config.offsite import OffsiteConfig
from fedsplit.config.privacy import PrivacyConfig
from fedsplit.config.robust import RobustConfig
from fedsplit.config.secure import SecureConfig
from fedsplit.config.server import ServerConfig
from fedsplit.config.serving import ServingConfig
from fedsplit.errors import ConfigError, check

Scalar: TypeAlias = bool | int | float | str


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
    labels: LabelsConfig = field(default_factory=LabelsConfig)
    dp: DpConfig = field(default_factory=DpConfig)
    data: DataConfig = field(default_factory=DataConfig)
    lineage: LineageConfig = field(default_factory=LineageConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    serving: ServingConfig = field(default_factory=ServingConfig)
    offsite: OffsiteConfig = field(default_factory=OffsiteConfig)
    robust: RobustConfig = field(default_factory=RobustConfig)
    secure: SecureConfig = field(default_factory=SecureConfig)
    buffer: BufferConfig = field(default_factory=BufferConfig)
    server: ServerConfig = field(default_factory=ServerConfig)

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
            settings = getattr(self, group)
            for one in fields(settings):
                flat[f"{group}.{one.name.replace('_', '-')}"] = getattr(settings, one.name)
        return flat


_GROUPS: dict[str, type] = {
    "model": ModelConfig,
    "split": SplitConfig,
    "train": TrainConfig,
    "session": SessionConfig,
    "privacy": PrivacyConfig,
    "labels": LabelsConfig,
    "dp": DpConfig,
    "data": DataConfig,
    "lineage": LineageConfig,
    "output": OutputConfig,
    "serving": ServingConfig,
    "offsite": OffsiteConfig,
    "robust": RobustConfig,
    "secure": SecureConfig,
    "buffer": BufferConfig,
    "server": ServerConfig,
}
_TYPES: dict[str, type] = {"str": str, "int": int, "float": float, "bool": bool}


def _known(cls: type) -> str:
    return "known: " + ", ".join(f.name for f in fields(cls))


def _coerce(name: str, value: object, kind: type) -> Any:
    """Return ``value`` as ``kind``; an int is accepted for a float, nothing else is converted."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) > 2**64:
            raise ConfigError(f"{name}: an integer of {value.bit_length()} bits: must fit a float")
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
