"""The mechanism that a run's settings ask for: the same at an owner and at the server.

Both sides build it from public knowledge alone (settings and the bottom), so the server can denoise
with the very law that the owners use, and no private text enters a privacy parameter.
"""

from __future__ import annotations

import torch
from torch import nn

from fedsplit.config import PrivacyConfig
from fedsplit.privacy import build, eta_from_ratio
from fedsplit.privacy.mechanism import Mechanism


def representation_norm(bottom: nn.Module, vocabulary: int) -> float:
    """Return the median L2 norm of the bottom's output over public inputs.

    The inputs are 64 sequences of 16 ids spread evenly over the vocabulary: everyone who has the
    bottom gets the same number, and no private text enters a privacy parameter.
    """
    ids = torch.linspace(0, vocabulary - 1, 64 * 16).long().view(16, 64).T.contiguous()  # (64, 16)
    with torch.no_grad():
        hidden = bottom(ids, torch.ones_like(ids))  # (64, 16, d)
    return float(hidden.norm(dim=2).median())


def build_mechanism(config: PrivacyConfig, bottom: nn.Module, vocabulary: int) -> Mechanism:
    """Return the configured mechanism; a noise ratio becomes eta through public inputs.

    Raises:
        ConfigError: unknown mechanism or a parameter out of range.
    """
    if config.mechanism != "dchi":
        return build(config.mechanism)
    eta = config.eta
    if not eta:
        norm = representation_norm(bottom, vocabulary)
        width = int(bottom(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)).shape[2])
        eta = eta_from_ratio(config.noise_ratio, width, norm)
    return build("dchi", eta=eta)
