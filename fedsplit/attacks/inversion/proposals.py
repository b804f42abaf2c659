"""Each row's likely tokens behind blocks, which searches of whole texts start from."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from fedsplit.attacks.base import Public
from fedsplit.attacks.inversion.row_evidence import lawful
from fedsplit.attacks.inversion.token_states import TokenStates, teaches


def proposals(
    of: Public, rows: Sequence[Tensor], count: int, *, seed: int = 0, seconds: float = 0.0
) -> list[Tensor] | None:
    """Return candidates per text, best first, ``(T_i, n)``; None: nobody reads.

    ``count`` of tokens' states, where there is public text and rows of a known law, and among
    them half as many of an inverter's where the learned attack has taught one.

    Args:
        of: what is known.
        rows: as received, per text ``(T_i, d)``.
        count: candidates per row of who reads first.
        seed: of what has to be made first.
        seconds: that this may take; 0 = no bound.
    """
    found = []
    if of.token_reader is not None:
        found.append(of.token_reader.rank(rows, count))
    elif lawful(of) and teaches(of):
        found.append(TokenStates(seed=seed, seconds=seconds).taught(of).rank(rows, count))
    if of.inverter is not None:
        found.append(of.inverter.rank(rows, count))
    if not found:
        return None
    return [_joined(texts) for texts in zip(*found, strict=True)]


def _joined(rankings: Sequence[Tensor]) -> Tensor:
    """Return rankings (T, n) of one text as one: two of the first's for each new one of another."""
    first, *others = rankings
    if not others:
        return first
    room = first.shape[1] + max(1, first.shape[1] // 2)
    merged = []
    for mine, *theirs in zip(*(ids.tolist() for ids in rankings), strict=True):
        turns = zip_longest(mine[::2], mine[1::2], *theirs)
        ids = dict.fromkeys(v for turn in turns for v in turn if v is not None)
        merged.append(list(ids)[:room])
    width = min(map(len, merged), default=0)
    return torch.tensor([ids[:width] for ids in merged]).long().view(len(merged), width)
