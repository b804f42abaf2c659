"""What each vocabulary token would look like in the representation: public knowledge, k = 0.

Where a bottom holds embeddings only, a token's vector depends on the token and its position, so
the whole finite set of noiseless representations is public.  Attackers search it
(:mod:`fedsplit.privacy.denoising.candidate_search`), servers denoise with it
(:mod:`fedsplit.privacy.denoising.posterior`), and
owners can round to it (:mod:`fedsplit.privacy.mechanisms.nearest_token`).

Candidates come in blocks of the vocabulary, so that (positions, V, d) never has to be in memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsplit.errors import PrivacyError, check
from fedsplit.privacy.mechanisms.base import clip_rows

Bottom = Callable[[Tensor, Tensor], Tensor]
"""``bottom(input_ids (B, T), attention_mask (B, T)) -> (B, T, d)``, in evaluation mode."""


class Candidates(ABC):
    """The noiseless vectors of every token, per position.

    Attributes:
        positions: P; 1 if a token's vector is the same wherever it stands.
        vocab_size: V.
        dim: d.
        device: where the vectors are.
    """

    positions: int
    vocab_size: int
    dim: int
    device: torch.device

    @abstractmethod
    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (first id, ``(P, v, d)``) until every id was covered, in order."""

    def materialise(self) -> MatrixCandidates:
        """Compute all blocks once; takes ``4 P V d`` bytes."""
        whole = torch.empty(self.positions, self.vocab_size, self.dim, device=self.device)
        for first, block in self.blocks():
            whole[:, first : first + block.shape[1]] = block
        return MatrixCandidates(whole)


class MatrixCandidates(Candidates):
    """Candidates that are in memory.

    Args:
        matrix: floating, ``(V, d)`` for all positions alike, or ``(P, V, d)``.

    Raises:
        PrivacyError: for another shape, or NaN or infinite values.
    """

    def __init__(self, matrix: Tensor) -> None:
        matrix = matrix.detach()
        if matrix.dim() == 2:
            matrix = matrix.unsqueeze(0)  # (1, V, d)
        if matrix.dim() != 3 or not matrix.is_floating_point() or 0 in matrix.shape:
            raise PrivacyError(
                f"candidates.shape={tuple(matrix.shape)}: must be (V, d) or (P, V, d), floating"
            )
        low, high = matrix.aminmax()  # no temporary as large as the matrix
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise PrivacyError("candidates: NaN or infinite values: must be finite")
        self.matrix = matrix.float()
        self.device = matrix.device
        self.positions, self.vocab_size, self.dim = matrix.shape

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        yield 0, self.matrix


class LinearCandidates(Candidates):
    """Candidates in other coordinates: every vector times ``matrix``, ``(d, d)``."""

    def __init__(self, inner: Candidates, matrix: Tensor) -> None:
        if matrix.shape != (inner.dim, inner.dim):
            raise PrivacyError(
                f"matrix.shape={tuple(matrix.shape)}: must be ({inner.dim}, {inner.dim})"
            )
        self._inner, self.device = inner, inner.device
        self._matrix = matrix.to(inner.device, torch.float32)
        self.positions, self.vocab_size, self.dim = inner.positions, inner.vocab_size, inner.dim

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        for first, block in self._inner.blocks():
            yield first, block @ self._matrix


class BottomCandidates(Candidates):
    """Candidates computed through a bottom as they are needed; see :func:`candidates_through`."""

    def __init__(
        self,
        bottom: Bottom,
        vocab_size: int,
        positions: int,
        device: torch.device,
        block: int,
        clip: float = 0.0,
    ) -> None:
        self._bottom, self._block, self._clip = bottom, block, clip
        self.device = device
        self.vocab_size, self.positions = vocab_size, positions
        self.dim = self._forward(torch.zeros(1, dtype=torch.int64)).shape[2]

    @torch.no_grad()
    def _forward(self, ids: Tensor) -> Tensor:
        """Run sequences that hold one token everywhere: ``(v,) -> (P, v, d)``."""
        batch = ids.to(self.device).unsqueeze(1).expand(-1, self.positions).contiguous()
        hidden = self._bottom(batch, torch.ones_like(batch))  # (v, P, d)
        rows = hidden.detach().float().transpose(0, 1)
        return clip_rows(rows, self._clip)

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        for start in range(0, self.vocab_size, self._block):
            stop = min(start + self._block, self.vocab_size)
            yield start, self._forward(torch.arange(start, stop))


def candidates_through(
    bottom: Bottom,
    vocab_size: int,
    positions: int,
    *,
    device: torch.device | str = "cpu",
    memory_bytes: int = 32 * 2**20,
    clip: float = 0.0,
) -> Candidates:
    """Build the candidates through ``bottom``: position and type embeddings, LayerNorm included.

    Args:
        bottom: embeddings only (k = 0), in evaluation mode.
        vocab_size: V, how many ids to consider.
        positions: P, the longest sequence to be searched.
        device: where ``bottom`` runs.
        memory_bytes: bound on one block of candidates (what fits a CPU's cache is fastest).
        clip: L2 norm that the rows were clipped to before noise (length units); 0 = they were not.

    Returns:
        One matrix in memory where positions do not matter (LLaMA), else blocks on demand.

    Raises:
        ConfigError: if ``vocab_size`` or ``positions`` is not positive.
        PrivacyError: if a token's vector depends on its neighbours (k > 0): then there is no finite
            candidate set; use :mod:`fedsplit.attacks.inversion.optimisation`.
    """
    check(vocab_size >= 1, "vocab_size", vocab_size, ">= 1 (tokens)")
    check(positions >= 1, "positions", positions, ">= 1 (tokens)")
    device = torch.device(device)
    probe = torch.linspace(0, vocab_size - 1, min(8, vocab_size)).long()
    lazy = BottomCandidates(bottom, vocab_size, positions, device, block=1)
    alone = lazy._forward(probe)  # (P, n, d)
    tolerance = 1e-5 * float(alone.abs().max())
    if positions > 1 and len(probe) > 1:
        mixed_ids = probe[torch.arange(positions) % len(probe)].unsqueeze(0).to(device)  # (1, P)
        with torch.no_grad():
            mixed = bottom(mixed_ids, torch.ones_like(mixed_ids)).detach().float()[0]  # (P, d)
        at = torch.arange(positions)
        moved = float((mixed - alone[at, at % len(probe)]).abs().max())
        if moved > tolerance:
            raise PrivacyError(
                f"bottom: a token's vector moves by {moved:.3g} with its neighbours: must be "
                f"<= {tolerance:.3g} (embeddings only, k = 0)"
            )
    if float((alone - alone[:1]).abs().max()) <= tolerance:
        lazy.positions = 1
        lazy._block, lazy._clip = max(1, memory_bytes // (4 * lazy.dim)), clip
        return lazy.materialise()
    lazy._block, lazy._clip = max(1, memory_bytes // (4 * lazy.dim * positions)), clip
    return lazy


@dataclass(frozen=True)
class Rows:
    """Tokens of many samples as one matrix, sorted by position so that each group is a slice."""

    rows: Tensor  # (N, d) float32, group after group
    bounds: list[tuple[int, int]]  # group p is rows[start:stop]
    order: Tensor  # (N,): row i of `rows` is token order[i] of the concatenated samples
    lengths: list[int]

    def positions(self) -> Tensor:
        """Return each row's candidate position, ``(N,)``; 0 where positions do not matter."""
        counts = torch.tensor([stop - start for start, stop in self.bounds])
        return torch.arange(len(counts)).repeat_interleave(counts).to(self.rows.device)

    def split(self, values: Tensor) -> list[Tensor]:
        """Bring per-row values, ``(N, ...)``, back to one tensor per sample, ``(T_i, ...)``."""
        out = torch.empty_like(values)
        out[self.order.to(values.device)] = values
        return list(torch.split(out, self.lengths))


def rows_by_position(representations: Sequence[Tensor], candidates: Candidates) -> Rows:
    """Sort the tokens of ``representations`` (each ``(T_i, d)``) by candidate position.

    Raises:
        PrivacyError: if there are none, a shape does not fit, or a sample is longer than the
            candidates' positions.
    """
    lengths = [int(x.shape[0]) for x in representations]
    if not sum(lengths):
        raise PrivacyError("representations: 0 tokens: must be >= 1")
    for i, x in enumerate(representations):
        if x.dim() != 2 or x.shape[1] != candidates.dim:
            raise PrivacyError(
                f"representations[{i}].shape={tuple(x.shape)}: must be (T, {candidates.dim})"
            )
    if candidates.positions > 1 and max(lengths) > candidates.positions:
        raise PrivacyError(
            f"longest sample={max(lengths)} tokens: must be <= {candidates.positions} positions"
        )
    flat = torch.cat([x.detach().to(candidates.device, torch.float32) for x in representations])
    if candidates.positions == 1:
        order = torch.arange(len(flat))
        return Rows(flat, [(0, len(flat))], order, lengths)
    position = torch.cat([torch.arange(n) for n in lengths])
    order = torch.argsort(position, stable=True)
    stops = torch.bincount(position, minlength=candidates.positions).cumsum(0).tolist()
    bounds = list(zip([0, *stops[:-1]], stops, strict=True))
    return Rows(flat[order.to(flat.device)], bounds, order, lengths)
