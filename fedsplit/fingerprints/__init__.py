"""Fingerprints of models, the lineage gate, evidence and portraits.

| module | what it does |
| --- | --- |
| :mod:`.view`, :mod:`.weights_file` | what a fingerprint reads: a live model, a half, or files |
| :mod:`.pcs` | parameter cosine |
| :mod:`.ics` | HuRef's invariants, corrected and as published |
| :mod:`.whitened` | the same through orthonormal embeddings: publishable, not fooled by twins |
| :mod:`.align`, :mod:`.awm` | residual alignment, unbiased CKA of aligned weights |
| :mod:`.aligned_products` | the gate's score: weight products in a common basis |
| :mod:`.reef` | CKA of representations |
| :mod:`.gate` | :class:`LineageGate`, the check after every aggregate |
| :mod:`.verdict` | calibrated test: p-value, error rates, three outcomes |
| :mod:`.public_file`, :mod:`.evidence` | signed fingerprint file, signed chain of rounds |
| :mod:`.transforms` | evasion suite of function-preserving maps |
| :mod:`.encoder`, :mod:`.portrait` | HuRef's picture: invariants to vector to dog |

What separates, on trained checkpoints (17 independent pairs, 11 of them twins that share data and
tokenizer; 5 fine-tuned or LoRA descendants; 2 after further training at 10 times the rate):

| fingerprint | strangers, mean (max) | descendants, least | AUC | abs Z | further-trained, Z |
| --- | --- | --- | --- | --- | --- |
| score (aligned products) | 0.01 (0.02) | 0.963 | 1.0 | 89 | 26, 68 |
| pcs | 0.01 (0.06) | 0.993 | 1.0 | 48 | 42, 45 |
| ics_whitened | 0.02 (0.06) | 0.959 | 1.0 | 47 | 10, 31 |
| awm | 0.25 (0.43) | 0.974 | 1.0 | 6.8 | 3.8, 5.0 |
| ics_published | 0.12 (0.41) | 0.709 | 1.0 | 4.4 | 3.8, 3.1 |
| reef | 0.54 (0.71) | 0.932 | 1.0 | 2.6 | 1.7, 1.2 |
| ics (corrected) | 0.42 (0.80) | 0.837 | 1.0 | 2.3 | -0.5, 0.8 |

PCS is lost under any function-preserving map (``transforms``); the others in this table, except
``ics_published``, are invariant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fedsplit.fingerprints.aligned_products import AlignedProducts
from fedsplit.fingerprints.awm import AWM
from fedsplit.fingerprints.gate import GateConfig, LineageGate, LineageReport
from fedsplit.fingerprints.ics import ICS, PublishedICS
from fedsplit.fingerprints.pcs import PCS
from fedsplit.fingerprints.reef import REEF
from fedsplit.fingerprints.view import Similarity, WeightView
from fedsplit.fingerprints.whitened import WhitenedICS


class Fingerprint(Protocol):
    """One way to compare two models."""

    name: str

    def compare(
        self, base: WeightView, suspect: WeightView, tokens: Sequence[int] | None = None
    ) -> Similarity:
        """Similarity of ``suspect`` to ``base``; ``tokens`` are the base's public list."""
        ...


FINGERPRINTS: dict[str, type[Fingerprint]] = {
    "pcs": PCS,
    "ics": ICS,
    "ics_published": PublishedICS,
    "ics_whitened": WhitenedICS,
    "awm": AWM,
    "reef": REEF,
    "score": AlignedProducts,
}

__all__ = [
    "FINGERPRINTS",
    "Fingerprint",
    "GateConfig",
    "LineageGate",
    "LineageReport",
    "Similarity",
    "WeightView",
]
