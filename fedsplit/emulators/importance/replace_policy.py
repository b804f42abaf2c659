"""Which blocks keep their place in a draw of LayerReplace, and how the scores learn from draws."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

REWARDS = ("exp", "standardised")


def groups_of(layers: int, group: int) -> list[range]:
    """Return adjacent blocks in groups of ``group``; a rest of one joins the last group."""
    starts = list(range(0, layers, group))
    if len(starts) > 1 and layers - starts[-1] < 2:
        starts.pop()
    return [range(a, b) for a, b in zip(starts, [*starts[1:], layers], strict=True)]


def draw_kept(
    scores: Tensor, group: int, replace: float, generator: torch.Generator
) -> tuple[int, ...]:
    """Draw the blocks that keep their place: of each group about 1 - ``replace``.

    Without replacement, with weights p_i = sigmoid(s_i), independently in each group.

    Args:
        scores: (L,).
        group: size of a group.
        replace: share of a group to replace; at least one block of each group is.
        generator: makes the draw reproducible.

    Returns:
        Positions in order; the others are replaced.
    """
    kept: list[int] = []
    for members in groups_of(len(scores), group):
        size = len(members)
        replaced = min(max(1, int(replace * size + 0.5)), size)
        if replaced < size:
            weights = torch.sigmoid(scores[members.start : members.stop].double()).clamp_min(1e-9)
            chosen = torch.multinomial(weights, size - replaced, generator=generator)
            kept += sorted(members[i] for i in chosen.tolist())
    return tuple(kept)


def updated_scores(
    scores: Tensor,
    subsets: Sequence[Sequence[int]],
    losses: Sequence[float],
    lr: float,
    reward: str,
) -> Tensor:
    """Return s_i + lr * sum over subsets k that kept i of A_k p_i (1 - p_i).

    A_k = R_k - mean(R) with R_k = exp(-loss_k); "standardised": R_k = -loss_k, A_k divided by the
    standard deviation of R.

    Args:
        scores: (L,).
        subsets: for each draw k, the blocks that were kept.
        losses: for each draw k, the loss on the same validation batch.
        lr: step size.
        reward: one of :data:`REWARDS`.
    """
    loss = torch.tensor(losses, dtype=torch.float64)
    rewards = torch.exp(-loss) if reward == "exp" else -loss
    advantages = rewards - rewards.mean()
    if reward == "standardised":
        advantages = advantages / rewards.std(correction=0).clamp_min(1e-9)
    p = torch.sigmoid(scores)
    new = scores.clone()
    for kept, advantage in zip(subsets, advantages.tolist(), strict=True):
        index = list(kept)
        new[index] += lr * advantage * (p * (1 - p))[index]
    return new
