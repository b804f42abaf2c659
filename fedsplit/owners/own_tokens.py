"""Which tokens of a text stand for the text itself, and which a tokenizer put between them.

A server that makes the tokenizer may let it write any number of words into every text.  What an
attacker reads of the text is then hidden among what it does not read of them, so an owner's
measurement asks what each token stands for.  The tokenizers library keeps the characters of the
raw text that each token came from; what a replacement inserts is laid to a character that a token
before it stands for already.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedsplit.owners.samples import encodings


def own_tokens(
    tokenizer: Any, texts: Sequence[str], ids: Sequence[Tensor], max_tokens: int
) -> list[Tensor] | None:
    """Return which tokens stand for characters of the raw text that no earlier token stands for.

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: raw.
        ids: their tokens ``(T_i,)``.
        max_tokens: at which they were cut.

    Returns:
        Per text, bool ``(T_i,)``; None where the tokenizer does not say what its tokens stand for.
    """
    found = encodings(tokenizer, texts, max_tokens)
    if found is None:
        return None
    own = []
    for (encoding, parts), row in zip(found, ids, strict=True):
        flags = _first_of_a_character(encoding, parts)
        if encoding.ids != row.tolist()[: len(encoding.ids)]:
            flags = [True] * len(flags)  # not these tokens: then all of them count
        flags += [False] * (len(row) - len(flags))  # what a short text was filled up with
        own.append(torch.tensor(flags[: len(row)], dtype=torch.bool))
    return own


def _first_of_a_character(encoding: Any, parts: Sequence[str]) -> list[bool]:
    taken = [[character.isspace() for character in part] for part in parts]
    flags = []
    for (start, stop), part in zip(encoding.offsets, encoding.sequence_ids, strict=True):
        if part is None:
            flags.append(False)
            continue
        flags.append(not all(taken[part][start:stop]))
        taken[part][start:stop] = [True] * len(taken[part][start:stop])
    return flags
