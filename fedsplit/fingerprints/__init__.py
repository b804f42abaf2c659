"""Fingerprints of models, the lineage gate, evidence and portraits.

| folder | what it holds |
| --- | --- |
| :mod:`~fedsplit.fingerprints.view` | what a fingerprint reads: a live model, a half, or files |
| :mod:`~fedsplit.fingerprints.methods` | fingerprints: cosine, invariants, aligned products, CKA |
| :mod:`~fedsplit.fingerprints.gate` | the check after every aggregate; verdicts with error rates |
| :mod:`~fedsplit.fingerprints.evidence` | keys, signed fingerprint files, signed chain of rounds |
| :mod:`~fedsplit.fingerprints.evasion` | maps that change weights and keep the function |
| :mod:`~fedsplit.fingerprints.portraits` | pictures of a fingerprint |

What separates and where each breaks is measured in ``docs/results/lineage.md``: the score and the
whitened invariants keep twins (same data and tokenizer, another seed) near 0 and descendants near
1; corrected ICS and REEF see function, which twins share; PCS is lost under any map that preserves
the function.

Examples:
    >>> from copy import deepcopy
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> base = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=50))
    >>> gate = LineageGate(base)
    >>> gate.check(deepcopy(base), commit=False).verdict
    'in_lineage'
    >>> gate.check(GPT2LMHeadModel(base.config), commit=False).verdict
    'independent'
"""

from __future__ import annotations

from fedsplit.fingerprints.gate.lineage_gate import GateConfig, LineageGate, LineageReport
from fedsplit.fingerprints.methods.aligned_products import AlignedProducts
from fedsplit.fingerprints.methods.awm import AWM
from fedsplit.fingerprints.methods.base import Fingerprint
from fedsplit.fingerprints.methods.ics import ICS, PublishedICS
from fedsplit.fingerprints.methods.pcs import PCS
from fedsplit.fingerprints.methods.reef import REEF
from fedsplit.fingerprints.methods.whitened import WhitenedICS
from fedsplit.fingerprints.view import Similarity, WeightView

FINGERPRINTS: dict[str, type[Fingerprint]] = {
    "score": AlignedProducts,
    "pcs": PCS,
    "ics_whitened": WhitenedICS,
    "awm": AWM,
    "ics_published": PublishedICS,
    "reef": REEF,
    "ics": ICS,
}
"""The family's table, in the order in which tables show it; a new one is a file and a row here."""

__all__ = [
    "FINGERPRINTS",
    "Fingerprint",
    "GateConfig",
    "LineageGate",
    "LineageReport",
    "Similarity",
    "WeightView",
]
