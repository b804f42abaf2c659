"""Closed-form readers of labels from gradients: what whoever sent the outputs can compute itself.

The server knows what it sent (logits, or hidden states and the head's weights), so for each class
it knows the gradient that an unprotected owner would have answered with: ``p - e_c`` for logits,
``W^T (p - e_c)`` for hidden states of a linear head.  It then asks which of them explains best what
came.  That contains the readers known by name: the one negative entry (argmin), the sign or
direction of a two-class gradient (Li et al., arXiv 2102.08504), inversion of a known head.
"""

from __future__ import annotations

import torch
from torch import Tensor

READERS = ("nearest", "direction")
MOST_CLASSES = 256
"""More are not tried one by one: then what leaves cannot be judged."""
_LIMIT = 50.0  # nats that one step may say of one label


def label_evidence(sent: Tensor, candidates: Tensor) -> Tensor:
    """Return how much one step's gradients speak for each class, by reader.

    Evidence of several steps about one label adds up.

    Args:
        sent: (B, d), what leaves, one gradient of a sample's own loss per row.
        candidates: (C, B, d), the gradients without protection if every label were c.

    Returns:
        (readers, B, C), nats, at most 0 for the best class.  *nearest* is the log-likelihood under
        isotropic noise of the strength that the best explanations leave over; *direction* is the
        cosine, in units of how far the best cosines are from 1.
    """
    rows, known = sent.double(), candidates.double()
    squared = (rows[None] - known).square().sum(2)  # (C, B)
    scale = known.square().sum(2).mean().clamp_min(1e-30)
    noise = squared.min(0).values.mean() / max(1, rows.shape[1])
    nearest = -squared / (2 * noise + 1e-9 * scale)
    tiny = torch.finfo(torch.float64).tiny
    lengths = rows.norm(dim=1)[None] * known.norm(dim=2)
    cosine = (rows[None] * known).sum(2) / lengths.clamp_min(tiny)
    spread = 1.0 - cosine.max(0).values.mean()
    direction = cosine / (spread.clamp_min(0.0) + 1e-3)
    found = torch.stack([nearest, direction]).transpose(1, 2)  # (readers, B, C)
    return (found - found.max(2, keepdim=True).values).clamp_min(-_LIMIT)


def known_evidence(labels: Tensor, classes: int) -> Tensor:
    """Return the evidence of gradients that show ``labels`` (B,) as they are."""
    found = torch.full((len(labels), classes), -_LIMIT, dtype=torch.float64)
    found[torch.arange(len(labels)), labels] = 0.0
    return found[None].repeat(len(READERS), 1, 1)
