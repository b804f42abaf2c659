"""The run's settings; see :mod:`fedsplit.config.run` for how they travel.

Examples:
    >>> from fedsplit.config import RunConfig
    >>> config = RunConfig.from_flat({"split.k": 2, "privacy.eta": 8.0})
    >>> config.split.k, config.train.rounds
    (2, 3)
    >>> RunConfig.from_flat({"split.K": 2})
    Traceback (most recent call last):
        ...
    fedsplit.errors.ConfigError: split.K=2: unknown setting; split.* has k, bottom, averaging
"""

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
from fedsplit.config.run import RunConfig, Scalar
from fedsplit.config.secure import SecureConfig
from fedsplit.config.server import ServerConfig
from fedsplit.config.serving import ServingConfig

__all__ = [
    "BufferConfig",
    "DataConfig",
    "DpConfig",
    "LabelsConfig",
    "LineageConfig",
    "ModelConfig",
    "OffsiteConfig",
    "OutputConfig",
    "PrivacyConfig",
    "RobustConfig",
    "RunConfig",
    "Scalar",
    "SecureConfig",
    "ServerConfig",
    "ServingConfig",
    "SessionConfig",
    "SplitConfig",
    "TrainConfig",
]
