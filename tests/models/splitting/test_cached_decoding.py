"""Token by token through both halves equals the whole model, family by family."""

from __future__ import annotations

import pytest
import torch

from fedsplit.errors import ConfigError, UnsupportedModelError
from fedsplit.models.splitting.cached_decoding import CachedBottom, CachedTop, check_cached_decoding
from fedsplit.models.splitting.halves import split
from tests.models.split_families import CASES, FAMILIES, LAYERS, VOCAB, tiny

GENERATORS = [name for name, task in CASES if task == "causal-lm"]
# Families whose own cache code does not allow it; each must say so instead of answering wrongly.
REFUSED: set[str] = set()


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("k", [0, LAYERS - 1])
def test_pieces_equal_the_whole(name: str, k: int) -> None:
    model = tiny(name, "causal-lm").to(FAMILIES[name].dtype)
    bottom, top = split(model, k)
    if name in REFUSED:
        with pytest.raises(UnsupportedModelError):
            check_cached_decoding(bottom, top)
        return
    check_cached_decoding(bottom, top)
    ids = torch.randint(3, VOCAB, (1, 9), generator=torch.Generator().manual_seed(k))
    with torch.inference_mode():
        whole = model(ids).logits[0].float()
    below, above = CachedBottom(bottom), CachedTop(top)
    scale = float(whole.abs().max())
    for first, end in ((0, 3), (3, 4), (4, 5), (5, 9)):
        logits = above.step(below.step(ids[:, first:end]))
        assert float((logits[0] - whole[end - 1]).abs().max()) < 2e-4 * scale
    assert above.seen == 9


def test_two_texts_do_not_meet() -> None:
    model = tiny("llama", "causal-lm").double()
    bottom, top = split(model, 1)
    texts = [torch.tensor([[3, 9, 4, 5]]), torch.tensor([[7, 7, 30, 2]])]
    decoders = [(CachedBottom(bottom), CachedTop(top)) for _ in texts]
    logits = [torch.empty(0)] * 2
    for at in range(4):
        for i, ids in enumerate(texts):
            logits[i] = decoders[i][1].step(decoders[i][0].step(ids[:, at : at + 1]))
    with torch.inference_mode():
        for ids, found in zip(texts, logits, strict=True):
            assert torch.allclose(model(ids).logits[:, -1].float(), found, atol=1e-5)


def test_what_cannot_be_stepped_is_refused() -> None:
    bottom, top = split(tiny("bert", "sequence-classification"), 1)
    with pytest.raises(ConfigError, match="causal-lm"):
        check_cached_decoding(bottom, top)
    bottom, top = split(tiny("llama", "causal-lm"), 1)
    with pytest.raises(ConfigError, match="hidden"):
        CachedTop(top).step(torch.zeros(2, 1, 16))
