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
| :mod:`.owner_updates` | the same for what an owner returns; leave-one-out |
| :mod:`.keys`, :mod:`.sources` | signing keys; what a command's argument may name |
| :mod:`.transforms` | evasion suite of function-preserving maps |
| :mod:`.encoder`, :mod:`.training` | HuRef's encoder: invariants to vector, and its recipe |
| :mod:`.portrait`, :mod:`.sheet`, :mod:`.onnx_generator` | vector to picture: dog, any ONNX |

What separates and where each breaks is measured in ``docs/results/lineage.md``: the score and the
whitened invariants keep twins (same data and tokenizer, another seed) near 0 and descendants near
1; corrected ICS and REEF see function, which twins share; PCS is lost under any map that preserves
the function.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fedsplit.fingerprints.gate.lineage_gate import GateConfig, LineageGate, LineageReport
from fedsplit.fingerprints.methods.aligned_products import AlignedProducts
from fedsplit.fingerprints.methods.awm import AWM
from fedsplit.fingerprints.methods.ics import ICS, PublishedICS
from fedsplit.fingerprints.methods.pcs import PCS
from fedsplit.fingerprints.methods.reef import REEF
from fedsplit.fingerprints.methods.whitened import WhitenedICS
from fedsplit.fingerprints.view import Similarity, WeightView


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
