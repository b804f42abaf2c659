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
    """A classifier's top that pads less; what it returns is what the top returns.

    Each text's logits depend on that text alone, so grouping changes nothing but rounding.

    Args:
        top: (hidden (B, T, d), mask (B, T), right-padded) -> logits (B, C).
    """

    def __init__(self, top: nn.Module) -> None:
        super().__init__()
        self.top = top

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return logits (B, C) in the order of ``hidden``."""
        lengths = mask.sum(dim=1).tolist()
        groups = groups_by_length(lengths)
        if len(groups) == 1:
            whole: Tensor = self.top(hidden, mask)
            return whole
        parts = []
        for group in groups:
            longest = max(1, lengths[group[-1]])
            index = torch.tensor(group, device=hidden.device)
            parts.append(self.top(hidden[index, :longest], mask[index, :longest]))
        back = torch.tensor([i for group in groups for i in group]).argsort()
        return torch.cat(parts)[back.to(parts[0].device)]
