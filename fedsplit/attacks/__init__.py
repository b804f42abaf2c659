"""What the other party could learn: attacks on what really left, with public knowledge.

An attack is given arrays of a recorded transcript and public material (the initial bottom, a public
corpus), never an owner object.  ``ATTACKS`` is the family's table; a new attack is a file here and
one row below.  Every row has a ``name``, says its ``knowledge`` and names the fields that are its
``budget``; a defence is called private only against the attacker named beside it.
"""

from __future__ import annotations

from typing import Any

from fedsplit.attacks.attribute import AttributeInference
from fedsplit.attacks.averaging import AveragingInversion
from fedsplit.attacks.contextual import ContextualInversion
from fedsplit.attacks.extraction import Extraction
from fedsplit.attacks.gradient_inversion import GradientInversion
from fedsplit.attacks.label_leakage import LabelLeakage
from fedsplit.attacks.learned import LearnedInversion
from fedsplit.attacks.map_inversion import MapInversion
from fedsplit.attacks.membership import MembershipInference
from fedsplit.attacks.nearest import NearestNeighbour
from fedsplit.attacks.ngram import NgramModel
from fedsplit.attacks.optimisation import OptimisationInversion
from fedsplit.attacks.scoring import AttackResult, Inversion, score_tokens
from fedsplit.attacks.token_search import ExactSearch

ATTACKS: dict[str, type[Any]] = {
    "attribute": AttributeInference,
    "averaging": AveragingInversion,
    "contextual": ContextualInversion,
    "exact_search": ExactSearch,
    "extraction": Extraction,
    "gradient": GradientInversion,
    "label_leakage": LabelLeakage,
    "learned": LearnedInversion,
    "map": MapInversion,
    "membership": MembershipInference,
    "nearest": NearestNeighbour,
    "optimisation": OptimisationInversion,
}

__all__ = [
    "ATTACKS",
    "AttackResult",
    "AttributeInference",
    "AveragingInversion",
    "ContextualInversion",
    "ExactSearch",
    "Extraction",
    "GradientInversion",
    "Inversion",
    "LabelLeakage",
    "LearnedInversion",
    "MapInversion",
    "MembershipInference",
    "NearestNeighbour",
    "NgramModel",
    "OptimisationInversion",
    "score_tokens",
]
