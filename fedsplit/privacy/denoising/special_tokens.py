"""Tokens that every text has: the server knows them, so their noise protects nothing.

A tokenizer puts the same special tokens (CLS, SEP, BOS ...) around every text, an owner sends the
texts' lengths, and at k = 0 a token's clean vector is public.  So the server can put the clean
vectors in place of what it received there.  It is post-processing, tells it nothing that it did not
know, and matters where a classifier reads its answer off the first token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fedsplit.errors import PrivacyError

Bottom = Callable[[Tensor, Tensor], Tensor]
Rows = Callable[[Sequence[Tensor]], list[Tensor]]


def special_ends(tokenizer: Any) -> tuple[int | None, int | None]:
    """Return the ids that begin and end every text, as the tokenizer's empty text shows them."""
    ids = [int(i) for i in tokenizer("")["input_ids"]]
    special = {int(i) for i in tokenizer.all_special_ids}
    if len(ids) == 2 and set(ids) <= special:
        return ids[0], ids[1]
    if len(ids) == 1 and ids[0] in special:
        one = [int(i) for i in tokenizer("a")["input_ids"]]
        return (ids[0], None) if one[0] == ids[0] else (None, ids[0])
    return None, None


class KnownSpecialTokens:
    """Clean vectors of the first and the last token in place of what was received.

    Args:
        inner: estimates of all other tokens; None leaves them as received.
        bottom: embeddings only (k = 0), in evaluation mode.
        ends: first and last id, see :func:`special_ends`; None where texts differ.
        positions: the longest text.
    """

    def __init__(
        self,
        inner: Rows | None,
        bottom: Bottom,
        ends: tuple[int | None, int | None],
        positions: int,
    ) -> None:
        self._inner = inner
        self._first, self._last = (
            None if token is None else _vectors(bottom, token, positions) for token in ends
        )

    def __call__(self, representations: Sequence[Tensor]) -> list[Tensor]:
        """Return the estimate of each token's vector, per sample ``(T_i, d)``.

        Raises:
            PrivacyError: for a sample longer than ``positions``.
        """
        found = list(representations) if self._inner is None else self._inner(representations)
        out = []
        for rows in found:
            clean = rows.clone()
            longest = len(rows)
            for table, at in ((self._first, 0), (self._last, longest - 1)):
                if table is None or not longest:
                    continue
                if at >= len(table):
                    raise PrivacyError(f"sample={longest} tokens: must be <= {len(table)}")
                clean[at] = table[at].to(clean)
            out.append(clean)
        return out


@torch.no_grad()
def _vectors(bottom: Bottom, token: int, positions: int) -> Tensor:
    """Return one token's clean vectors at every position, ``(P, d)``."""
    ids = torch.full((1, positions), token)
    return bottom(ids, torch.ones_like(ids))[0].detach().float()
