"""Words and a tokenizer's tokens: which token stands for which word.

A text of words is tokenised as what it is, the words joined by spaces, and never word by word: its
tokens, and so its representation and its noise, are those of the same text in any other task.
Which token belongs to which word is told by the characters that tokens cover.  A word is tagged at
its first token; its other tokens, and the tokenizer's own, are ignored in loss and prediction.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsplit.data.tagged import words_of
from fedsplit.errors import DataError, ModelError

log = logging.getLogger(__name__)

LOST = -1


@dataclass(frozen=True)
class AlignedText:
    """One text's tokens, and where its words are in them.

    Attributes:
        ids: tokens, cut to the bound.
        first: for each word the position of its first token, or :data:`LOST`: the text was cut
            before it, or the tokenizer makes no token of it.
        cut: number of words that the cut took away.
    """

    ids: tuple[int, ...]
    first: tuple[int, ...]
    cut: int = 0


def align(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> list[AlignedText]:
    """Tokenise texts of words and find each word's first token.

    What a cut takes away is told in the log.

    Args:
        tokenizer: a Hugging Face tokenizer, a fast one (only these tell characters).
        texts: each a text of words (:func:`fedsplit.data.tagged.join_words`).
        max_tokens: longer ones are cut.

    Raises:
        ModelError: the tokenizer cannot tell which characters a token covers.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{type(tokenizer).__name__}: must be a fast tokenizer: tags of words need the "
            "characters that a token covers"
        )
    found = tokenizer(
        list(texts),
        truncation=True,
        max_length=max_tokens,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
    )
    keys = ("input_ids", "offset_mapping", "special_tokens_mask")
    aligned = []
    for text, ids, spans, own in zip(texts, *(found[key] for key in keys), strict=True):
        covered = [None if special else span for span, special in zip(spans, own, strict=True)]
        aligned.append(_aligned(text, ids, covered, len(ids) >= max_tokens))
    cut = [text.cut for text in aligned if text.cut]
    if cut:
        log.warning(
            "of %d texts, %d are longer than max_tokens=%d: %d words at their ends have no token; "
            "they are not trained on, and count as tagged O in what is measured",
            *(len(texts), len(cut), max_tokens, sum(cut)),
        )
    return aligned


def _aligned(
    text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int] | None], full: bool
) -> AlignedText:
    first, end = first_tokens(text, offsets)
    words = words_of(text)
    cut, at = 0, 0
    for position, word in zip(first, words, strict=True):
        cut += full and position == LOST and at >= end
        at += len(word) + 1
    return AlignedText(tuple(ids), tuple(first), cut)


def first_tokens(text: str, offsets: Sequence[tuple[int, int] | None]) -> tuple[list[int], int]:
    """Return (position of each word's first token or :data:`LOST`, end of what tokens cover).

    A token belongs to the word that its first character is of; a space is the following word's, as
    tokenizers that mark the beginning of words have it.

    Args:
        text: words joined by one space.
        offsets: for each token the first character that it covers, and the one after its last; None
            for the tokenizer's own tokens.
    """
    word_at: list[int] = []  # for each character its word
    words = words_of(text)
    for number, word in enumerate(words):
        word_at += [number] * (len(word) + (number > 0))
    first, covered = [LOST] * len(words), 0
    for position, span in enumerate(offsets):
        if span is None or not 0 <= span[0] < len(text):
            continue
        covered = max(covered, span[1])
        if first[word_at[span[0]]] == LOST:
            first[word_at[span[0]]] = position
    return first, covered


def tagged_words(place: str, aligned: AlignedText, tags: Sequence[int]) -> Tensor:
    """Return a text's words as (W, 2) int64: position of the first token or -1, and tag.

    At least one word has a position: where the tokenizer leaves none, the text's first word stands
    at its first token.  Refusing or leaving out the text would tell the tokenizer's maker which it
    is.

    Raises:
        DataError: another number of tags than of words.
    """
    if len(tags) != len(aligned.first):
        raise DataError(
            f"{place}: {len(tags)} tags: must be one for each of {len(aligned.first)} words"
        )
    first = list(aligned.first)
    if all(position == LOST for position in first):
        first[0] = 0
    return torch.tensor(list(zip(first, tags, strict=True)), dtype=torch.int64)
