"""Texts of like length share a forward: the same logits and gradients with less padding.

A cohort's batch has the union of its owners' texts.  Padded to the longest, much of what the top
computes on natural text is padding.  Sorted by length and cut into a few groups, each padded to its
own longest, little of it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

# What one more forward and backward is taken to cost, in positions: small groups no longer pay.
GROUP_COST = 64
MOST_GROUPS = 8


def groups_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Return indices in groups of like length, which together cover all of them once.

    The number of groups (of equal count) is the one with the fewest positions computed, each group
    counted as :data:`GROUP_COST` more.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    best: list[list[int]] = [order]
    fewest = float("inf")
    for count in range(1, min(MOST_GROUPS, len(order)) + 1):
        cuts = [round(i * len(order) / count) for i in range(count + 1)]
        groups = [order[a:b] for a, b in itertools.pairwise(cuts)]
        cost = sum(len(g) * lengths[g[-1]] + GROUP_COST for g in groups)
        if cost < fewest:
            best, fewest = groups, cost
    return best


class LengthBuckets(nn.Module):
    """A top that pads less; what it returns is what the top returns.

    Each text's logits depend on that text alone, so grouping changes nothing but rounding.

    Args:
        top: (hidden (B, T, d), mask (B, T), right-padded) -> logits (B, C), or (B, T, C).
    """

    def __init__(self, top: nn.Module) -> None:
        super().__init__()
        self.top = top

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return logits (B, C) in the order of ``hidden``."""
        parts, back = self._grouped(hidden, mask)
        if len(parts) == 1:
            return parts[0][0]
        return torch.cat([logits for logits, _ in parts])[back.to(parts[0][0].device)]

    def tokens(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return logits (tokens, C) of the tokens that the mask keeps, text by text."""
        parts, back = self._grouped(hidden, mask)
        kept = [logits[own.to(logits.device).bool()] for logits, own in parts]
        if len(parts) == 1:
            return kept[0]
        counts = [int(n) for _, own in parts for n in own.sum(dim=1)]
        rows = torch.split(torch.cat(kept), counts)
        return torch.cat([rows[at] for at in back.tolist()])

    def _grouped(self, hidden: Tensor, mask: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Return (each group's logits and mask, where each text is among the groups' texts)."""
        lengths = mask.sum(dim=1).tolist()
        groups = groups_by_length(lengths)
        if len(groups) == 1:
            return [(self.top(hidden, mask), mask)], torch.arange(len(lengths))
        parts = []
        for group in groups:
            longest = max(1, lengths[group[-1]])
            index = torch.tensor(group, device=hidden.device)
            own = mask[index, :longest]
            parts.append((self.top(hidden[index, :longest], own), own))
        return parts, torch.tensor([i for group in groups for i in group]).argsort()
