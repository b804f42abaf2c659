"""What an owner does to representations before they leave: mechanisms, noise secret, accounting.

Names are resolved on first use: a ledger or a policy needs no torch.  A new mechanism is a file in
:mod:`fedsplit.privacy.mechanisms` and one row of its table.

Examples:
    >>> import torch
    >>> from fedsplit.privacy import OwnerSecret, SamplePerturber, build
    >>> mechanism = build("dchi", eta=30.0)
    >>> noise = SamplePerturber(mechanism, OwnerSecret(bytes(range(32))), "toy bottom, k = 0")
    >>> hidden, ids = torch.zeros(3, 8), torch.tensor([5, 6, 7])
    >>> sent = noise.perturb(hidden, ids)  # (T, d)
    >>> sent.equal(noise.perturb(hidden, ids))  # the same sample, the same noise
    True
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedsplit.registry import lazy

if TYPE_CHECKING:
    from fedsplit.privacy.contributing_tokens import (
        ContributingTokens,
        choose_tokens,
        select_contributing_tokens,
    )
    from fedsplit.privacy.mechanisms.base import Mechanism
    from fedsplit.privacy.mechanisms.calibration import representation_norm
    from fedsplit.privacy.mechanisms.dchi import DChi, eta_from_ratio
    from fedsplit.privacy.mechanisms.gaussian import Gaussian
    from fedsplit.privacy.mechanisms.nearest_token import NearestToken
    from fedsplit.privacy.mechanisms.none import NoNoise
    from fedsplit.privacy.mechanisms.pac import Pac
    from fedsplit.privacy.mechanisms.table import (
        MECHANISMS,
        build,
        build_mechanism,
        mechanism_type,
    )
    from fedsplit.privacy.perturb import SamplePerturber
    from fedsplit.privacy.secret import OwnerSecret, SecretStream

__all__ = [
    "MECHANISMS",
    "ContributingTokens",
    "DChi",
    "Gaussian",
    "Mechanism",
    "NearestToken",
    "NoNoise",
    "OwnerSecret",
    "Pac",
    "SamplePerturber",
    "SecretStream",
    "build",
    "build_mechanism",
    "choose_tokens",
    "eta_from_ratio",
    "mechanism_type",
    "representation_norm",
    "select_contributing_tokens",
]

__getattr__ = lazy(
    __name__,
    {
        "contributing_tokens": (
            "ContributingTokens",
            "choose_tokens",
            "select_contributing_tokens",
        ),
        "mechanisms.base": ("Mechanism",),
        "mechanisms.calibration": ("representation_norm",),
        "mechanisms.dchi": ("DChi", "eta_from_ratio"),
        "mechanisms.gaussian": ("Gaussian",),
        "mechanisms.nearest_token": ("NearestToken",),
        "mechanisms.none": ("NoNoise",),
        "mechanisms.pac": ("Pac",),
        "mechanisms.table": ("MECHANISMS", "build", "build_mechanism", "mechanism_type"),
        "perturb": ("SamplePerturber",),
        "secret": ("OwnerSecret", "SecretStream"),
    },
)
