"""What the other party could learn: attacks on what really left, with public knowledge.

An attack is given arrays of a recorded transcript and public material (the initial bottom, a public
corpus), never an owner object.  ``ATTACKS`` is the family's table; a new attack is a file here and
one row below.
"""

from __future__ import annotations

from typing import Any

from fedsplit.attacks.attribute import AttributeInference
from fedsplit.attacks.label_leakage import LabelLeakage
from fedsplit.attacks.map_inversion import MapInversion
from fedsplit.attacks.nearest import NearestNeighbour
from fedsplit.attacks.optimisation import OptimisationInversion
from fedsplit.attacks.scoring import AttackResult, Inversion, score_tokens

ATTACKS: dict[str, type[Any]] = {
    "attribute": AttributeInference,
    "label_leakage": LabelLeakage,
    "map": MapInversion,
    "nearest": NearestNeighbour,
    "optimisation": OptimisationInversion,
}

__all__ = [
    "ATTACKS",
    "AttackResult",
    "AttributeInference",
    "Inversion",
    "LabelLeakage",
    "MapInversion",
    "NearestNeighbour",
    "OptimisationInversion",
    "score_tokens",
]
