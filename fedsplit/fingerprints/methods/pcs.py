"""Parameter cosine similarity: the cosine of all shared parameters, matched by name.

HuRef (arXiv 2312.04828), section 3.1.  Fine-tuning hardly turns the parameter vector, so the cosine
stays above 0.99; independent models are orthogonal.

What breaks it: any function-preserving permutation, rotation or rescaling (it is not an invariant;
use the aligned products), and norm vectors, which are near 1 in every model: with them
independent twins score 0.34, without 0.004 - so one-dimensional tensors are left out by default.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedsplit.errors import LineageError, ModelError
from fedsplit.fingerprints.methods.base import Fingerprint
from fedsplit.fingerprints.view import Similarity, WeightView, same_width

_CHUNK = 1 << 22


@dataclass(frozen=True)
class Moments:
    """Inner product and squared norms of one tensor pair, in float64."""

    dot: float
    base: float
    suspect: float

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.dot + other.dot, self.base + other.base, self.suspect + other.suspect)

    def cosine(self) -> float:
        """Return dot / (|base| |suspect|); 1 for two zero vectors, 0 if only one is zero."""
        if self.base == 0.0 and self.suspect == 0.0:
            return 1.0
        if self.base == 0.0 or self.suspect == 0.0:
            return 0.0
        return self.dot / math.sqrt(self.base) / math.sqrt(self.suspect)


def moments(base: Tensor, suspect: Tensor, name: str = "tensor") -> Moments:
    """Return the moments of two tensors, in chunks; a longer first axis is cut to the shorter.

    Raises:
        LineageError: if the shapes differ beyond the first axis.
        ModelError: for NaN or infinite values.
    """
    if base.dim() != suspect.dim() or base.shape[1:] != suspect.shape[1:]:
        raise LineageError(
            f"parameter={name!r}: shape {tuple(suspect.shape)}, the base's is {tuple(base.shape)}"
        )
    if base.dim() and base.shape[0] != suspect.shape[0]:
        rows = min(base.shape[0], suspect.shape[0])
        base, suspect = base[:rows], suspect[:rows]
    a, b = base.detach().reshape(-1), suspect.detach().reshape(-1)
    total = Moments(0.0, 0.0, 0.0)
    for start in range(0, a.numel(), _CHUNK):
        x = a[start : start + _CHUNK].to("cpu", torch.float64)
        y = b[start : start + _CHUNK].to("cpu", torch.float64)
        total = total + Moments(float(x @ y), float(x @ x), float(y @ y))
    if not math.isfinite(total.base) or not math.isfinite(total.suspect):
        raise ModelError(f"parameter={name!r}: contains NaN or infinite values")
    return total


class PCS(Fingerprint):
    """Parameter cosine by canonical name.

    Args:
        vectors: include one-dimensional tensors (norms, biases), as HuRef's tables do.
        min_coverage: least fraction of the base's block parameters that the suspect must have under
            the same names.
    """

    name: ClassVar[str] = "pcs"
    label: ClassVar[str] = "PCS"
    colour: ClassVar[str] = "#1f77b4"
    strangers: ClassVar[str] = "0.06"
    descendants: ClassVar[str] = "0.993"

    def __init__(self, *, vectors: bool = False, min_coverage: float = 0.9) -> None:
        self.vectors = vectors
        self.min_coverage = min_coverage

    def compare(
        self, base: WeightView, suspect: WeightView, tokens: Sequence[int] | None = None
    ) -> Similarity:
        """Return the cosine of all shared parameters; one pair of tensors in memory at a time.

        Raises:
            LineageError: if widths or shapes differ, or too few names match.
            ModelError: for NaN or infinite values.
        """
        del tokens
        same_width(base, suspect)
        ours, theirs = base.canonical(), suspect.canonical()
        shared = [n for n in ours if n in theirs]
        inside = [n for n in ours if n.startswith("blocks.")]
        depth = min(base.depth, suspect.depth)
        wanted = [n for n in inside if int(n.split(".")[1]) < depth]
        missing = [n for n in wanted if n not in theirs]
        if len(missing) > (1 - self.min_coverage) * len(wanted):
            raise LineageError(
                f"parameters: {len(missing)} of {len(wanted)} are missing or renamed, "
                f"such as {missing[:3]}"
            )
        total = Moments(0.0, 0.0, 0.0)
        blocks = [Moments(0.0, 0.0, 0.0) for _ in range(depth)]
        for short in shared:
            first = base.get(ours[short])
            if not first.is_floating_point() or (first.dim() < 2 and not self.vectors):
                continue
            found = moments(first, suspect.get(theirs[short]), short)
            total = total + found
            if short.startswith("blocks."):
                index = int(short.split(".")[1])
                blocks[index] = blocks[index] + found
        notes = (f"{len(missing)} parameters missing",) if missing else ()
        return Similarity(total.cosine(), {}, tuple(b.cosine() for b in blocks), notes)
