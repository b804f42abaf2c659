"""What the other party could learn: attacks on what really left, with public knowledge.

An attack reads a :class:`View`: arrays of a recorded transcript and public material (the initial
bottom, a public corpus), never an owner object.  ``attack.run(view, truth)`` carries it out and
scores it; the truth is the scorer's alone.  ``ATTACKS`` is the family's table
(:mod:`fedsplit.attacks.table`).  Every row has a ``name``, says what it ``reads`` and ``needs``,
its ``knowledge`` and the fields that are its ``budget``; a defence is called private only against
the attacker named beside it.

Examples:
    >>> import torch
    >>> from fedsplit.privacy.denoising.candidates import MatrixCandidates
    >>> table = torch.eye(6)  # what each of 6 tokens looks like at k = 0
    >>> truth = [torch.tensor([1, 4, 2])]
    >>> view = View(Public(candidate_set=MatrixCandidates(table)), rows=[table[truth[0]] + 0.1])
    >>> make_attack("nearest", top_k=2).run(view, Truth(ids=truth)).success
    1.0
"""

from __future__ import annotations

from fedsplit.attacks.base import (
    Attack,
    Confidences,
    Public,
    Step,
    TokenAttack,
    Truth,
    Update,
    View,
)
from fedsplit.attacks.extraction.attack import Extraction
from fedsplit.attacks.gradients.update_inversion import GradientInversion
from fedsplit.attacks.gradients.update_sets import BiasGradient, EmbeddingUpdate
from fedsplit.attacks.inversion.averaging import AveragingInversion
from fedsplit.attacks.inversion.contextual import ContextualInversion
from fedsplit.attacks.inversion.learned import LearnedInversion
from fedsplit.attacks.inversion.map_decoding import MapInversion
from fedsplit.attacks.inversion.nearest import NearestNeighbour
from fedsplit.attacks.inversion.optimisation import OptimisationInversion
from fedsplit.attacks.inversion.text_search import TextSearch
from fedsplit.attacks.inversion.token_search import ExactSearch
from fedsplit.attacks.labels.leakage import LabelLeakage
from fedsplit.attacks.membership.attribute import AttributeInference
from fedsplit.attacks.membership.lira import MembershipInference
from fedsplit.attacks.scoring import AttackResult, Inversion, score_tokens
from fedsplit.attacks.table import ATTACKS, make_attack, suited

__all__ = [
    "ATTACKS",
    "Attack",
    "AttackResult",
    "AttributeInference",
    "AveragingInversion",
    "BiasGradient",
    "Confidences",
    "ContextualInversion",
    "EmbeddingUpdate",
    "ExactSearch",
    "Extraction",
    "GradientInversion",
    "Inversion",
    "LabelLeakage",
    "LearnedInversion",
    "MapInversion",
    "MembershipInference",
    "NearestNeighbour",
    "OptimisationInversion",
    "Public",
    "Step",
    "TextSearch",
    "TokenAttack",
    "Truth",
    "Update",
    "View",
    "make_attack",
    "score_tokens",
    "suited",
]
