"""Texts as a tokenizer's tokens; which of them stand for the text, and which were put between.

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

from fedsplit.data import SEPARATOR


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


def token_counts(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Return how many tokens each text has before anything is cut, special ones included."""
    return [len(ids) for ids in encode_texts(tokenizer, texts, None)]


def lines_of(text: str) -> str:
    """Return a text for a tokenizer without pairs: its parts as lines."""
    return text.replace(SEPARATOR, "\n")


def encodings(
    tokenizer: Any, texts: Sequence[str], most: int
) -> list[tuple[Any, list[str]]] | None:
    """Return what the tokenizers library says of each text, and the parts that its offsets are of.

    None where the tokenizer is not the library's.
    """
    found, parts = _encoded(tokenizer, texts, most)
    held = getattr(found, "encodings", None)
    return None if held is None else list(zip(held, parts, strict=True))


def encode_texts(tokenizer: Any, texts: Sequence[str], most: int | None) -> list[list[int]]:
    """Return each text's tokens, special ones included, cut to ``most``; None: not cut."""
    found, _ = _encoded(tokenizer, texts, most)
    return [list(ids) for ids in found["input_ids"]]


def _encoded(tokenizer: Any, texts: Sequence[str], most: int | None) -> tuple[Any, list[list[str]]]:
    cut = {} if most is None else {"truncation": True, "max_length": most}
    parts = [text.split(SEPARATOR) for text in texts]
    if all(len(part) == 2 for part in parts) and _knows_pairs(tokenizer):
        first, second = ([part[side] for part in parts] for side in (0, 1))
        return tokenizer(first, second, **cut), parts
    whole = [lines_of(text) for text in texts]
    return tokenizer(whole, **cut), [[text] for text in whole]


def fillers(tokenizer: Any) -> list[int | None]:
    """Return the tokens that a text too short is filled up with, the first that is there."""
    return [getattr(tokenizer, f"{name}_token_id", None) for name in ("eos", "pad")]


def _knows_pairs(tokenizer: Any) -> bool:
    """Whether the tokenizer puts a token of its own between two texts."""
    count = getattr(tokenizer, "num_special_tokens_to_add", lambda pair: 0)
    return bool(count(pair=True) > count(pair=False))
