"""Which tokens stand for a text, whatever the tokenizer that came writes between them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fedsplit.data import SEPARATOR
from fedsplit.owners.own_tokens import own_tokens
from fedsplit.owners.samples import tokenise
from simulations.adversary.material import FILLER, word_tokenizer
from tests.tiny_models import WORDS

TEXTS = [" ".join(WORDS[i : i + 5]) for i in range(0, 15, 5)]


def flags(tokenizer: Any, texts: list[str]) -> list[torch.Tensor]:
    samples = tokenise(tokenizer, texts, None, max_tokens=64, classes=2)
    found = own_tokens(tokenizer, samples.raw, samples.ids, 64)
    assert found is not None
    assert [len(x) for x in found] == samples.lengths
    return found


def test_fillers_between_words_are_not_the_texts():
    tokenizer = word_tokenizer(WORDS, before=["[A]"], after=["[B]"], spread=3)
    for row, ids in zip(flags(tokenizer, TEXTS), tokenizer(TEXTS)["input_ids"], strict=True):
        words = [token in WORDS for token in tokenizer.convert_ids_to_tokens(ids)]
        assert row.tolist() == words
        assert sum(words) == 5
        assert FILLER in tokenizer.convert_ids_to_tokens(ids)


def test_many_kinds_of_fillers_are_not_the_texts():
    many = " ".join(f"~{i}" for i in range(7))
    tokenizer = word_tokenizer([*WORDS, *many.split()])
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Replace(" ", f" {many} ")
    for row in flags(tokenizer, TEXTS):
        assert int(row.sum()) == 5
        assert len(row) == 5 + 4 * 7


@pytest.mark.parametrize("kind", ["bytes", "metaspace", "replace"])
def test_honest_tokenizers_write_nothing_in(kind: str):
    letters = sorted(set("".join(WORDS)) | {"▁", "Ġ"} | set("Ã©¶"))
    made = Tokenizer(models.BPE({c: i for i, c in enumerate([*letters, "?"])}, [], unk_token="?"))
    if kind == "bytes":
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif kind == "metaspace":
        made.pre_tokenizer = pre_tokenizers.Metaspace()
    else:
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    made.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?")
    for text, row in zip(TEXTS, flags(tokenizer, TEXTS), strict=True):
        assert int(row.sum()) == len(text.replace(" ", "")), kind


def test_pairs_and_what_fills_up_a_short_text():
    tokenizer = word_tokenizer(WORDS, before=["[A]"])
    pair = f"{WORDS[0]} {WORDS[1]}{SEPARATOR}{WORDS[0]}"
    assert flags(tokenizer, [pair])[0].sum() == 3
    samples = tokenise(tokenizer, [WORDS[0]], [0], max_tokens=8, classes=2, shortest=4)
    (row,) = own_tokens(tokenizer, samples.raw, samples.ids, 8) or ()
    assert row.tolist() == [False, True, False, False]


def test_a_slow_tokenizer_says_nothing():
    def slow(texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[1, 2] for _ in texts]}

    assert own_tokens(slow, ["a b"], [torch.tensor([1, 2])], 8) is None
