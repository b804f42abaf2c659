"""The run's settings; see :mod:`fedsplit.config.run` for how they travel."""

from fedsplit.config.groups import (
    TASKS,
    DataConfig,
    LineageConfig,
    ModelConfig,
    OutputConfig,
    SessionConfig,
    SplitConfig,
    TrainConfig,
)
from fedsplit.config.privacy import PrivacyConfig
from fedsplit.config.run import RunConfig, Scalar

__all__ = [
    "TASKS",
    "DataConfig",
    "LineageConfig",
    "ModelConfig",
    "OutputConfig",
    "PrivacyConfig",
    "RunConfig",
    "Scalar",
    "SessionConfig",
    "SplitConfig",
    "TrainConfig",
]
