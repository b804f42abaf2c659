"""The attacks, by name: the one table that commands and experiments run them from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from fedsplit.attacks.base import Attack, View
from fedsplit.attacks.extraction.attack import Extraction
from fedsplit.attacks.gradients.closed_form import ClosedForm
from fedsplit.attacks.gradients.gradient_map import GradientMap
from fedsplit.attacks.gradients.head_refit import HeadRefit
from fedsplit.attacks.gradients.joint_decoding import JointDecoding
from fedsplit.attacks.gradients.logit_gradients import LogitGradients
from fedsplit.attacks.gradients.matching import Matching
from fedsplit.attacks.gradients.update_inversion import GradientInversion
from fedsplit.attacks.gradients.update_sets import BiasGradient, EmbeddingUpdate
from fedsplit.attacks.inversion.averaging import AveragingInversion
from fedsplit.attacks.inversion.contextual import ContextualInversion
from fedsplit.attacks.inversion.learned import LearnedInversion
from fedsplit.attacks.inversion.map_decoding import MapInversion
from fedsplit.attacks.inversion.nearest import NearestNeighbour
from fedsplit.attacks.inversion.optimisation import OptimisationInversion
from fedsplit.attacks.inversion.replaced_tokens import ReplacedTokens
from fedsplit.attacks.inversion.text_search import TextSearch
from fedsplit.attacks.inversion.token_search import ExactSearch
from fedsplit.attacks.inversion.token_states import TokenStates
from fedsplit.attacks.labels.leakage import LabelLeakage
from fedsplit.attacks.membership.attribute import AttributeInference
from fedsplit.attacks.membership.lira import MembershipInference
from fedsplit.errors import ConfigError
from fedsplit.registry import pick

ATTACKS: dict[str, type[Attack]] = {
    row.name: row
    for row in (
        NearestNeighbour,
        MapInversion,
        ContextualInversion,
        ReplacedTokens,
        AveragingInversion,
        OptimisationInversion,
        LearnedInversion,
        TokenStates,
        ExactSearch,
        TextSearch,
        LogitGradients,
        ClosedForm,
        HeadRefit,
        Matching,
        GradientMap,
        JointDecoding,
        EmbeddingUpdate,
        GradientInversion,
        BiasGradient,
        LabelLeakage,
        AttributeInference,
        MembershipInference,
        Extraction,
    )
}
"""The family's table; of those that read the same, the stronger come later.  A new attack is a
file, and one row here."""


def make_attack(
    name: str, seed: int = 0, budget: Mapping[str, Mapping[str, Any]] | None = None, **own: Any
) -> Attack:
    """Return the attack ``name``.

    Args:
        name: a row of :data:`ATTACKS`.
        seed: for attacks that draw.
        budget: attack -> its fields that are not the defaults.
        **own: further fields.

    Raises:
        ConfigError: no such attack or field, or a value out of range.
    """
    row = pick(ATTACKS, name, "attack")
    known = {f.name for f in fields(row)}  # type: ignore[arg-type]
    given = {**({"seed": seed} if "seed" in known else {}), **(budget or {}).get(name, {}), **own}
    unknown = sorted(given.keys() - known)
    if unknown:
        raise ConfigError(f"{name} setting={unknown[0]!r}: must be one of {', '.join(known)}")
    return row(**given)


def suited(
    view: View, seed: int = 0, budget: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Attack]:
    """Return the attacks that fit a view, the strongest last."""
    made = (make_attack(name, seed, budget) for name in ATTACKS)
    return [attack for attack in made if attack.applies(view)]
