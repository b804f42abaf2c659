"""What a low-rank update makes of a matrix: LoRA's sum, and DoRA's with trained magnitudes."""

from __future__ import annotations

import torch
from torch import Tensor


def updated(
    weight: Tensor, change: Tensor, magnitude: Tensor | None = None, *, turned: bool = False
) -> Tensor:
    """Return ``weight + change``, with DoRA's magnitudes as the norms of its outputs' rows.

    DoRA (arXiv 2402.09353, equation 5): row i of V = W + change becomes
    ``magnitude[i] V[i] / |V[i]|``.

    Args:
        weight: W, (out, in), or (in, out) where ``turned``.
        change: of the same shape, scaled as the method says.
        magnitude: (out,); None: of LoRA.
        turned: whether the matrix is kept as GPT-2's Conv1D keeps it.
    """
    made = weight + change.to(weight.dtype)
    if magnitude is None:
        return made
    dim = 0 if turned else 1
    factor = magnitude.float() / torch.linalg.norm(made.float(), dim=dim)  # (out,)
    found: Tensor = made.float() * factor.unsqueeze(dim)
    return found.to(weight.dtype)
