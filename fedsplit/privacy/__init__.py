"""What an owner does to representations before they leave: mechanisms, noise secret, accounting.

``MECHANISMS`` is the family's table; a new mechanism is a file here and one row below.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from fedsplit.errors import ConfigError
from fedsplit.privacy.contributing_tokens import ContributingTokens, select_contributing_tokens
from fedsplit.privacy.mechanisms.base import Mechanism
from fedsplit.privacy.mechanisms.dchi import DChi, eta_from_ratio
from fedsplit.privacy.mechanisms.gaussian import Gaussian
from fedsplit.privacy.mechanisms.nearest_token import NearestToken
from fedsplit.privacy.mechanisms.none import NoNoise
from fedsplit.privacy.mechanisms.pac import Pac
from fedsplit.privacy.perturb import SamplePerturber
from fedsplit.privacy.secret import OwnerSecret, SecretStream
from fedsplit.registry import pick

MECHANISMS: dict[str, type[Mechanism]] = {
    "dchi": DChi,
    "gaussian": Gaussian,
    "nearest-token": NearestToken,
    "none": NoNoise,
    "pac": Pac,
}


def build(name: str, **params: Any) -> Mechanism:
    """Return the mechanism ``name`` with its parameters.

    Raises:
        ConfigError: for an unknown name, an unknown, missing or out-of-range parameter.
    """
    mechanism = pick(MECHANISMS, name, "mechanism")
    known = [f.name for f in fields(mechanism) if f.init]
    unknown = sorted(set(params) - set(known))
    if unknown:
        raise ConfigError(f"{name} parameter={unknown[0]!r}: must be one of {known}")
    try:
        return mechanism(**params)
    except TypeError as error:
        raise ConfigError(f"mechanism={name!r}: {error}") from error


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
    "eta_from_ratio",
    "select_contributing_tokens",
]
