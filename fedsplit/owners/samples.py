"""An owner's samples as token ids in slots, the only names the server ever hears for them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsplit.errors import DataError


@dataclass(frozen=True)
class Samples:
    """Tokenised texts and private labels of one split, in slot order.

    Attributes:
        ids: one int64 tensor (T_i,) per slot, without padding.
        labels: one class per slot, or None for causal language modelling.
        texts: what identifies each slot's raw text (:func:`text_identity`): views, draws and
            budgets are counted by it, whatever tokens a server's tokenizer makes of the text.
    """

    ids: tuple[Tensor, ...]
    labels: Tensor | None
    texts: tuple[bytes, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> list[int]:
        """Tokens per slot."""
        return [int(x.shape[0]) for x in self.ids]


def text_identity(text: str) -> bytes:
    """Return 32 bytes that identify a raw text: SHA-256 of its UTF-8 bytes, normalised in no way.

    No tokenizer, cut or bottom enters: what a server can change must not make another text of it.
    """
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def piece_identity(text: bytes, continuation: Sequence[int]) -> bytes:
    """Return what identifies a piece of a text that is being generated.

    Args:
        text: identity of the prompt.
        continuation: ids generated so far, the piece's own included; empty: the prompt itself.
    """
    if not continuation:
        return text
    ids = np.asarray(continuation, dtype="<i8").tobytes()
    return hashlib.sha256(text + ids).digest()


def tokenise(
    tokenizer: Any,
    texts: Sequence[str],
    labels: Sequence[int] | None,
    *,
    max_tokens: int,
    classes: int,
    order: np.ndarray | None = None,
    shortest: int = 0,
) -> Samples:
    """Tokenise texts into slots.

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: the owner's texts.
        labels: class per text, or None for causal language modelling.
        max_tokens: longer texts are cut.
        classes: number of classes the parties agreed on.
        order: permutation of the texts; slot i holds text ``order[i]``.  A source sorted by label
            would otherwise tell labels by slot.
        shortest: fewest tokens of a text; 0 = 1 with labels, 2 without, since a language-modelling
            sample needs a next token.

    Raises:
        DataError: no text, a text without tokens, or a label outside [0, classes).
    """
    if not texts:
        raise DataError("owner's split has 0 texts: must be >= 1")
    if order is not None:
        texts = [texts[i] for i in order]
        labels = None if labels is None else [labels[i] for i in order]
    if labels is not None:
        for slot, label in enumerate(labels):
            if not 0 <= int(label) < classes:
                raise DataError(f"label={label} (slot {slot}): must be in [0, {classes})")
    encoded = tokenizer(list(texts), truncation=True, max_length=max_tokens)["input_ids"]
    shortest = shortest or (1 if labels is not None else 2)
    for slot, ids in enumerate(encoded):
        if len(ids) < shortest:
            raise DataError(f"text in slot {slot} has {len(ids)} tokens: must be >= {shortest}")
    return Samples(
        tuple(torch.tensor(ids, dtype=torch.int64) for ids in encoded),
        None if labels is None else torch.tensor([int(x) for x in labels], dtype=torch.int64),
        tuple(text_identity(text) for text in texts),
    )
