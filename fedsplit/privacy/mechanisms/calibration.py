"""Calibration of noise: norms and covariances over known inputs.

What noise a sample gets must never depend on how many threads computed a norm: a norm that differs
in its last digit would draw a second noise for a sample that was sent before.  So numbers are
rounded to 4 digits, and an owner keeps matrices on its disk (:class:`Store`) once they are made.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedsplit import storage
from fedsplit.config import PrivacyConfig
from fedsplit.errors import check

Forward = Callable[[Tensor, Tensor], Tensor]

CLIP_QUANTILE = 0.95
"""Share of public rows that are no longer than C where ``privacy.row-clip`` is ``auto``."""


def rounded(value: float) -> float:
    """Return ``value`` to 4 significant digits."""
    return float(f"{value:.4g}")


def public_inputs(vocabulary: int, sequences: int = 64) -> Tensor:
    """Return ids spread evenly over the vocabulary, ``(sequences, 16)``: nobody's text."""
    spread = torch.linspace(0, vocabulary - 1, sequences * 16, dtype=torch.float64)
    return spread.long().view(16, sequences).T.contiguous()


@torch.no_grad()
def public_vectors(bottom: Forward, vocabulary: int, sequences: int = 64) -> Tensor:
    """Return the bottom's output over :func:`public_inputs`, ``(sequences, 16, d)``."""
    parts = [
        bottom(ids, torch.ones_like(ids)).detach().float()
        for ids in torch.split(public_inputs(vocabulary, sequences), 64)
    ]
    return torch.cat(parts)


@dataclass(frozen=True)
class Norms:
    """Lengths of vectors over public inputs (units of the representation).

    Attributes:
        median: of all.
        largest: of all.
        dim: their dimension.
        clip: C, the bound that rows are clipped to before noise; 0 = they are not.
    """

    median: float
    largest: float
    dim: int
    clip: float = 0.0

    @property
    def length(self) -> float:
        """Length that a noise ratio refers to: C where rows are clipped, else the median."""
        return self.clip or self.median


def norms_of(vectors: Tensor, row_clip: str = "off") -> Norms:
    """Return the norms of ``vectors``, ``(..., d)``.

    Args:
        vectors: public ones.
        row_clip: as in :class:`fedsplit.config.PrivacyConfig`; ``auto`` is the
            :data:`CLIP_QUANTILE` of their norms.
    """
    norms = vectors.norm(dim=-1).flatten()
    clip = 0.0
    if row_clip == "auto":
        clip = rounded(float(torch.quantile(norms, CLIP_QUANTILE)))
        check(clip > 0, "privacy.row-clip", clip, "> 0 (the bottom's public rows are all 0)")
    elif row_clip != "off":
        clip = float(row_clip)
    median, largest = float(norms.median()), float(norms.max())
    return Norms(rounded(median), rounded(largest), vectors.shape[-1], clip)


def covariance_over(samples: Sequence[Tensor], subsamples: int = 1) -> Tensor:
    """Return a covariance that no subsample exceeds along its main directions.

    The samples are dealt in turn to ``subsamples`` parts.  With v_j the eigenvectors of the
    covariance of all, the result has along v_j the largest variance of any part, or of the whole:
    the bound then holds for each part as well, as far as the off-diagonal terms allow.

    Args:
        samples: ``(T_i, d)`` each.
        subsamples: number of parts, >= 1; 1 gives the covariance of all.

    Returns:
        float64, ``(d, d)``.

    Raises:
        ConfigError: fewer than two samples or two tokens per part.
    """
    check(len(samples) >= 2, "samples", len(samples), ">= 2 (to estimate a covariance)")
    whole = torch.cat([x.detach().cpu().double() for x in samples])  # (N, d)
    check(len(whole) >= 2, "tokens", len(whole), ">= 2 (to estimate a covariance)")
    base = torch.cov(whole.T).reshape(whole.shape[1], whole.shape[1])
    if subsamples == 1:
        return base
    values, vectors = torch.linalg.eigh(base)
    largest = values.clamp(min=0)
    for part in range(min(subsamples, len(samples) // 2)):
        rows = torch.cat([x.detach().cpu().double() for x in samples[part::subsamples]])
        if len(rows) >= 2:
            largest = torch.maximum(largest, (rows @ vectors).var(dim=0))
    found: Tensor = vectors @ torch.diag(largest) @ vectors.T
    return found


class Store:
    """An owner's calibrations on its own disk: made once per bottom and recipe, then only read.

    Args:
        folder: created when something is first kept.
        bottom: identifies the map from tokens to vectors.
    """

    def __init__(self, folder: Path, bottom: str) -> None:
        self.folder, self.bottom = folder, bottom

    def matrix(self, recipe: Iterable[str | int | float], make: Callable[[], Tensor]) -> Tensor:
        """Return the matrix of that recipe; made by ``make`` if this disk has none yet."""
        from safetensors.torch import load_file, save

        key = json.dumps([self.bottom, *recipe])
        path = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            content = save({"matrix": make().contiguous()}, metadata={"recipe": key})
            with contextlib.suppress(FileExistsError):  # whoever was first is right
                storage.create(path, content)
        return load_file(path)["matrix"]


def word_table(bottom: nn.Module) -> Tensor:
    """Return the bottom's word embeddings, ``(V, d)`` float32: what text-to-text noise is put on.

    Raises:
        UnsupportedModelError: if the model has no plain table of words.
    """
    from fedsplit.models.anatomy import probe

    embedding = probe(bottom.model).input_embeddings  # type: ignore[arg-type]
    return next(embedding.parameters()).detach().float().cpu()


def representation_norm(bottom: nn.Module, vocabulary: int) -> float:
    """Return the median L2 norm of the bottom's output over public inputs.

    The inputs are 64 sequences of 16 ids spread evenly over the vocabulary: everyone who has the
    bottom gets the same number, and no private text enters a privacy parameter.
    """
    return norms_of(public_vectors(bottom, vocabulary)).median


@dataclass(frozen=True)
class CalibrationInputs:
    """What a mechanism may be built from.

    Attributes:
        config: the settings.
        bottom: the bottom, in evaluation mode.
        vocabulary: V.
        specials: ids of the tokenizer's special tokens.
        own: the owner's token ids, ``(T_i,)`` each; None at the server.
        store: the owner's calibrations on disk; None at the server.
        tokenizer: of the bottom; None where none is needed.
    """

    config: PrivacyConfig
    bottom: nn.Module
    vocabulary: int
    specials: frozenset[int] = frozenset()
    own: Sequence[Tensor] | None = None
    store: Store | None = None
    tokenizer: Any = None

    @cached_property
    def norms(self) -> Norms:
        """Norms of the bottom's output over public inputs."""
        return norms_of(public_vectors(self.bottom, self.vocabulary), self.config.row_clip)

    @cached_property
    def words(self) -> Tensor:
        """The bottom's word embeddings, ``(V, d)`` float32."""
        return word_table(self.bottom)
