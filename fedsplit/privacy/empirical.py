"""What an owner hands to the attackers that it runs on itself, and what they found.

The owner's side (:mod:`fedsplit.owners`) and the attacks (:mod:`fedsplit.attacks`) are peers that
never import each other; a measuring function is handed to the owner by whoever starts it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedsplit.privacy.denoising.posterior import Touched
from fedsplit.privacy.mechanisms.base import Mechanism

ATTACKERS = 2
"""Number of the set of attackers that measure; raise it when one of them learns to read more.

Figures that fewer or weaker ones found are not taken for those of today's.
"""


@dataclass(frozen=True, kw_only=True)
class Exposed:
    """What would cross of a sample of an owner's own texts, and what everyone knows.

    Attributes:
        bottom: in evaluation mode.
        mechanism: of each view.
        views: per view, what would leave of each text, ``(T_i, d)``.
        ids: the texts' tokens ``(T_i,)``; the scorer's alone.
        known: tokens of public texts.
        others: tokens of more texts of the owner's kind, which an attacker may have the like of.
        touched: reduced noise on some tokens, as announced.
        own: which tokens stand for the raw text, bool ``(T_i,)``, and not for what the tokenizer
            wrote between; the scorer's alone; None: not known.
        seconds: what attackers that learn or search may take together.
    """

    bottom: Any
    mechanism: Mechanism
    views: Sequence[Sequence[Tensor]]
    ids: Sequence[Tensor]
    known: Sequence[Sequence[int]]
    others: Sequence[Sequence[int]] = ()
    touched: Touched | None = None
    own: Sequence[Tensor] | None = None
    seconds: float = 60.0


@dataclass(frozen=True)
class Reading:
    """What one attacker read.

    Attributes:
        attack: its name.
        read: share of the targets, in [0, 1].
        low: lower end of the share's 95 % interval.
        high: upper end.
        targets: tokens or labels that were there to be read.
        seconds: what it took.
    """

    attack: str
    read: float
    low: float
    high: float
    targets: int
    seconds: float


Measure = Callable[[Exposed], list[Reading]]
"""Runs the strongest attackers of a setting's kind on what would cross."""
