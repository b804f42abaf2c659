"""Embedding inversion by exact L2 nearest neighbour: the first attack on any split at k = 0.

Split-and-Privatize, arXiv 2312.15603, section 4 (embedding inversion attack, EIA).  The search
itself is :func:`fedsplit.privacy.denoising.candidate_search.search`; for one guess per token in a
plain matrix it is
:mod:`fedsplit.attacks.inversion.filtered_search` where the CPU makes that faster.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedsplit.attacks.base import TokenAttack, View
from fedsplit.attacks.inversion.filtered_search import BLOCK, filtered_search, pays_off
from fedsplit.attacks.scoring import Inversion
from fedsplit.errors import check
from fedsplit.privacy.denoising.candidate_search import search
from fedsplit.privacy.denoising.candidates import Candidates, MatrixCandidates


def has_candidates(view: View) -> bool:
    """Return whether every token has one vector: no block is in front of the cut."""
    return view.public.candidate_set is not None or view.public.bottom.k == 0


@dataclass(frozen=True)
class CandidateAttack(TokenAttack):
    """An attack that searches the finite set of clean vectors of rows before any block.

    Args:
        top_k: guesses ranked per token.
    """

    top_k: int = 10

    def __post_init__(self) -> None:
        check(self.top_k >= 1, "top_k", self.top_k, ">= 1 (guesses)")

    def applies(self, view: View) -> bool:
        """Return whether the rows have a finite candidate set."""
        return super().applies(view) and has_candidates(view)


@dataclass(frozen=True)
class NearestNeighbour(CandidateAttack):
    """The attack: each received vector is read as its nearest candidate."""

    name: ClassVar[str] = "nearest"
    knows: ClassVar[str] = "white box: the initial bottom (k = 0), nothing about the noise"
    result_key: ClassVar[str] = "embedding_inversion"
    words: ClassVar[str] = "read as its nearest vocabulary vector"

    def read(self, view: View) -> Inversion:
        return self.invert(view.rows, view.public.candidates(view.rows))

    def invert(self, representations: Sequence[Tensor], candidates: Candidates) -> Inversion:
        """Guess the tokens behind ``representations``, per sample ``(T_i, d)``."""
        start = time.perf_counter()
        ids = self._filtered(representations, candidates)
        if ids is None:
            ids, _ = search(representations, candidates, self.top_k)
        return Inversion(ids, time.perf_counter() - start)

    def _filtered(
        self, representations: Sequence[Tensor], candidates: Candidates
    ) -> list[Tensor] | None:
        """Return the same guesses by the faster way where there is one, else None."""
        lengths = [int(x.shape[0]) for x in representations]
        if (
            self.top_k > 1
            or not isinstance(candidates, MatrixCandidates)
            or candidates.positions > 1
            or candidates.device.type != "cpu"
            or candidates.vocab_size < BLOCK
            or sum(lengths) < BLOCK
            or any(x.dim() != 2 or x.shape[1] != candidates.dim for x in representations)
            or not pays_off()
        ):
            return None
        flat = torch.cat([x.detach().to("cpu", torch.float32) for x in representations])
        found = filtered_search(flat, candidates.matrix[0], 1)
        return None if found is None else list(torch.split(found, lengths))
