"""Words and tokens: laws over tokenizers of every kind, and what a cut takes."""

from __future__ import annotations

import logging
import unicodedata
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from fedsplit.errors import DataError, ModelError
from fedsplit.owners.alignment import LOST, align, tagged_words

CORPUS = ["the cat sat on the mat", "@paulwalk it's the view from where I'm living", "naïve café"]


def _wordpiece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=90, special_tokens=["[UNK]", "[CLS]", "[SEP]"])
    )
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return made


def _byte_level(trim: bool) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.post_processor = processors.ByteLevel(trim_offsets=trim)
    made.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
    )
    return made


def _sentencepiece() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=60, special_tokens=["<unk>"], unk_token="<unk>")
    )
    return made


TOKENIZERS = {
    "wordpiece": PreTrainedTokenizerFast(tokenizer_object=_wordpiece(), unk_token="[UNK]"),
    "bytes": PreTrainedTokenizerFast(tokenizer_object=_byte_level(True)),
    "bytes, spaces counted": PreTrainedTokenizerFast(tokenizer_object=_byte_level(False)),
    "sentencepiece": PreTrainedTokenizerFast(tokenizer_object=_sentencepiece(), unk_token="<unk>"),
}
# To a tokenizer that normalises by NFKC a spacing accent is a space and an accent: alone its word
# begins with one space, behind another word with two; words and text are not the same to it.
letters = st.characters(exclude_categories=["Cs", "Zs", "Zl", "Zp", "Cc"]).filter(
    lambda letter: " " not in unicodedata.normalize("NFKC", letter)
)
word = st.text(letters, min_size=1, max_size=8) | st.sampled_from(
    ["@paulwalk", "it's", "café", "cat", "http://t.co/x1", "\ufe0f", "🙂", "日本"]
)
words = st.lists(word, min_size=1, max_size=12)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=40, deadline=None)
@given(words)
def test_each_word_begins_at_the_token_that_the_tokenizer_says(kind: str, words: list[str]) -> None:
    """``word_ids`` of the words given one by one is the reference."""
    tokenizer = TOKENIZERS[kind]

    found = align(tokenizer, [" ".join(words)], 10_000)[0]

    listed = tokenizer([words], is_split_into_words=True)
    assert list(found.ids) == list(listed["input_ids"][0])
    ids = listed.word_ids(0)
    assert found.first == tuple(ids.index(n) if n in ids else LOST for n in range(len(words)))
    assert found.cut == 0


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=30, deadline=None)
@given(words, st.integers(3, 12))
def test_a_cut_takes_the_last_words_and_no_other(kind: str, words: list[str], most: int) -> None:
    tokenizer = TOKENIZERS[kind]

    whole = align(tokenizer, [" ".join(words)], 10_000)[0]
    found = align(tokenizer, [" ".join(words)], most)[0]

    assert len(found.ids) == min(most, len(whole.ids))
    end = len(found.ids) - (kind == "wordpiece")  # its last token is the tokenizer's own
    alive = [p for p in found.first if p != LOST]
    assert alive == [p for p in whole.first if p != LOST and p < end]
    lost = sum(p != LOST for p in whole.first) - len(alive)
    assert found.cut >= lost  # words that have no token anyway may be beyond the cut too
    assert found.cut <= sum(p == LOST for p in found.first)


def test_the_tokens_are_those_of_the_same_text_without_tags() -> None:
    tokenizer = TOKENIZERS["wordpiece"]
    text = "@paulwalk It's the view"

    assert list(align(tokenizer, [text], 64)[0].ids) == tokenizer(text)["input_ids"]


def test_a_cut_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        align(TOKENIZERS["wordpiece"], ["the cat sat on the mat", "cat"], 5)

    assert "of 2 texts, 1 are longer than max_tokens=5: 3 words at their ends" in caplog.text


def test_a_text_without_any_token_of_a_word_still_has_a_target() -> None:
    aligned = align(TOKENIZERS["wordpiece"], ["\ufe0f \ufe0f"], 8)[0]

    assert aligned.first == (LOST, LOST)
    assert tagged_words("here", aligned, [4, 5]).tolist() == [[0, 4], [LOST, 5]]


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False

    slow: Any = Slow()
    with pytest.raises(ModelError, match="Slow: must be a fast tokenizer"):
        align(slow, ["a"], 8)


def test_another_number_of_tags_is_refused() -> None:
    aligned = align(TOKENIZERS["wordpiece"], ["cat mat"], 8)[0]
    with pytest.raises(DataError, match="here: 3 tags: must be one for each of 2 words"):
        tagged_words("here", aligned, [0, 0, 0])
