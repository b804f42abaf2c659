"""Special tokens at the ends: put right wherever they stand, and nothing else is touched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedsplit.errors import PrivacyError
from fedsplit.models.loading import load
from fedsplit.privacy.denoising.special_tokens import KnownSpecialTokens, special_ends
from tests.tiny_models import save_tiny_bert

TABLE = torch.randn(6, 20, 4, generator=torch.Generator().manual_seed(0))


def bottom(ids: Tensor, mask: Tensor) -> Tensor:
    return TABLE[torch.arange(ids.shape[1])[None], ids]


def test_ends_are_clean_and_the_rest_is_the_inner_estimate():
    ids = [torch.tensor([2, 7, 8, 3]), torch.tensor([2, 9, 9, 9, 9, 3]), torch.tensor([2])]
    clean = [bottom(x[None], x)[0] for x in ids]
    noisy = [x + 1 for x in clean]

    both = KnownSpecialTokens(None, bottom, (2, 3), 6)(noisy)
    begin = KnownSpecialTokens(lambda rows: [x - 0.5 for x in rows], bottom, (2, None), 6)(noisy)

    assert torch.equal(both[0][[0, 3]], clean[0][[0, 3]])
    assert torch.equal(both[0][1:3], noisy[0][1:3])
    assert torch.equal(both[1][[0, 5]], clean[1][[0, 5]])
    assert torch.equal(begin[1][0], clean[1][0])
    assert torch.equal(begin[1][1:], noisy[1][1:] - 0.5)
    assert torch.equal(noisy[0], clean[0] + 1)  # what was received is kept as it was
    with pytest.raises(PrivacyError, match="sample=7 tokens: must be <= 6"):
        KnownSpecialTokens(None, bottom, (2, 3), 6)([torch.zeros(7, 4)])


def test_the_tokenizer_says_what_the_ends_are(tmp_path: Path):
    tokenizer = load(
        str(save_tiny_bert(tmp_path)), "sequence-classification", num_labels=3
    ).tokenizer

    assert special_ends(tokenizer) == (2, 3)
