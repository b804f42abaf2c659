"""What the other party could learn: attacks on what really left, with public knowledge.

An attack is given arrays of a recorded transcript and public material (the initial bottom, a public
corpus), never an owner object.  ``ATTACKS`` is the family's table; a new attack is a file here and
one row below.  Every row has a ``name``, says its ``knowledge`` and names the fields that are its
``budget``; a defence is called private only against the attacker named beside it.

Example:
    >>> import torch
    >>> from fedsplit.privacy.denoising.candidates import MatrixCandidates
    >>> table = torch.eye(6)  # what each of 6 tokens looks like at k = 0
    >>> truth = [torch.tensor([1, 4, 2])]
    >>> received = [table[truth[0]] + 0.1]
    >>> guesses = NearestNeighbour(top_k=2).invert(received, MatrixCandidates(table))
    >>> score_tokens("nearest", guesses, truth).success
    1.0
"""

from __future__ import annotations

from typing import Any

from fedsplit.attacks.extraction.attack import Extraction
from fedsplit.attacks.gradients.update_inversion import GradientInversion
from fedsplit.attacks.inversion.averaging import AveragingInversion
from fedsplit.attacks.inversion.contextual import ContextualInversion
from fedsplit.attacks.inversion.learned import LearnedInversion
from fedsplit.attacks.inversion.map_decoding import MapInversion
from fedsplit.attacks.inversion.nearest import NearestNeighbour
from fedsplit.attacks.inversion.optimisation import OptimisationInversion
from fedsplit.attacks.inversion.token_search import ExactSearch
from fedsplit.attacks.labels.leakage import LabelLeakage
from fedsplit.attacks.membership.attribute import AttributeInference
from fedsplit.attacks.membership.lira import MembershipInference
from fedsplit.attacks.ngram import NgramModel
from fedsplit.attacks.scoring import AttackResult, Inversion, score_tokens

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
