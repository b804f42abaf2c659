"""Table of the mechanisms, and the mechanism that a run's settings ask for.

Both sides build it from public knowledge alone (settings and the bottom), so the server can denoise
with the very distribution that the owners draw from, and no private text enters a privacy
parameter.  The one exception, ``privacy.covariance = "own"``, is the owner's and stays with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from torch import Tensor, nn

from fedsplit.config import PrivacyConfig
from fedsplit.errors import ConfigError, check
from fedsplit.privacy.levels import PolicyBound
from fedsplit.privacy.mechanisms.base import Mechanism
from fedsplit.privacy.mechanisms.calibration import CalibrationInputs, Store
from fedsplit.privacy.mechanisms.dchi import DChi
from fedsplit.privacy.mechanisms.gaussian import Gaussian
from fedsplit.privacy.mechanisms.nearest_token import NearestToken
from fedsplit.privacy.mechanisms.none import NoNoise
from fedsplit.privacy.mechanisms.pac import Pac
from fedsplit.privacy.mechanisms.shaped import Shaped
from fedsplit.registry import pick

MECHANISMS: dict[str, type[Mechanism]] = {
    "none": NoNoise,
    "dchi": DChi,
    "gaussian": Gaussian,
    "nearest-token": NearestToken,
    "pac": Pac,
    "shaped": Shaped,
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


def mechanism_type(config: PrivacyConfig) -> type[Mechanism]:
    """Return the class of the configured mechanism, after its check of the settings.

    Raises:
        ConfigError: unknown mechanism, or settings that it cannot be built from.
    """
    check(
        config.mechanism in MECHANISMS,
        "privacy.mechanism",
        config.mechanism,
        "one of " + ", ".join(MECHANISMS),
    )
    MECHANISMS[config.mechanism].check_settings(config)
    return MECHANISMS[config.mechanism]


def build_mechanism(
    config: PrivacyConfig,
    bottom: nn.Module,
    vocabulary: int,
    tokenizer: Any = None,
    *,
    own: Sequence[Tensor] | None = None,
    store: Store | None = None,
    frozen: bool = True,
) -> Mechanism:
    """Return the configured mechanism; a noise ratio becomes its own level through public inputs.

    Args:
        config: the settings.
        bottom: the bottom, in evaluation mode.
        vocabulary: number of its token ids.
        tokenizer: for its special tokens (a mechanism that replaces tokens keeps them) and words.
        own: an owner's token ids, for ``covariance = "own"``; where there is no owner (a server,
            which may not denoise then), the public covariance is the best guess.
        store: where an owner keeps what must never be computed twice.
        frozen: whether the bottom stays as it is.

    Raises:
        ConfigError: unknown mechanism or a parameter out of range; a mechanism that needs a frozen
            bottom with one that learns, which would send another representation of one text in
            every round.
        PrivacyError: an owner (it has a ``store``) asked for its own covariance and gave no text.
    """
    mechanism = mechanism_type(config)
    if mechanism.needs_frozen_bottom and not frozen:
        raise ConfigError(
            f"privacy.mechanism={config.mechanism!r}: must be another where split.bottom is 'joint'"
        )
    specials = frozenset(int(i) for i in tokenizer.all_special_ids) if tokenizer else frozenset()
    inputs = CalibrationInputs(config, bottom, vocabulary, specials, own, store, tokenizer)
    made = mechanism.from_settings(inputs)
    if config.row_clip == "off" or not mechanism.protects():
        return made
    return replace(made, row_clip=mechanism.public_norms(inputs).clip)


def strength_bounds() -> dict[str, PolicyBound]:
    """Return every rule of a policy that bounds a mechanism's level, by the rule's name."""
    levels = [m.level for m in MECHANISMS.values() if m.level is not None]
    return {level.bound.rule: level.bound for level in levels if level.bound is not None}


def cost_of_draw(description: Mapping[str, Any]) -> tuple[str, float]:
    """Return unit and amount that one draw of a described mechanism costs.

    The unit is ``none`` where the mechanism has no guarantee that adds up, or is not known here.
    """
    mechanism = MECHANISMS.get(str(description.get("mechanism")))
    return ("none", 0.0) if mechanism is None else mechanism.cost_of(description)
