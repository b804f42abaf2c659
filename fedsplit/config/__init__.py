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
from fedsplit.config.labels import DpConfig, LabelsConfig
from fedsplit.config.offsite import OffsiteConfig
from fedsplit.config.privacy import PrivacyConfig
from fedsplit.config.run import RunConfig, Scalar
from fedsplit.config.serving import ServingConfig

__all__ = [
    "TASKS",
    "DataConfig",
    "DpConfig",
    "LabelsConfig",
    "LineageConfig",
    "ModelConfig",
    "OffsiteConfig",
    "OutputConfig",
    "PrivacyConfig",
    "RunConfig",
    "Scalar",
    "ServingConfig",
    "SessionConfig",
    "SplitConfig",
    "TrainConfig",
]
