"""Which samples are in which step, and what a sample must be."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from fedsplit.config import TrainConfig
from fedsplit.errors import DataError
from fedsplit.owners.samples import Samples, text_identity, tokenise
from fedsplit.owners.split.schedule import evaluation_steps, slot_order, train_steps
from fedsplit.privacy.secret import OwnerSecret

SIZES = st.integers(1, 40)


@given(n=SIZES, batch=st.integers(1, 12), epochs=st.integers(1, 3), rounds=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_each_sample_is_used_once_per_epoch(n: int, batch: int, epochs: int, rounds: int) -> None:
    config = TrainConfig(batch_size=batch, epochs=epochs)
    seen: dict[int, list[int]] = {}
    for round_ in range(1, rounds + 1):
        batches, numbers = train_steps(n, config, 5, "owner-0", round_)
        assert len(batches) == len(numbers) == epochs * -(-n // batch)
        for slots, epoch in zip(batches, numbers, strict=True):
            assert 1 <= len(slots) <= batch
            seen.setdefault(epoch, []).extend(int(s) for s in slots)
    assert sorted(seen) == list(range(rounds * epochs))
    for slots in seen.values():
        assert sorted(slots) == list(range(n))


@given(n=SIZES, batch=st.integers(1, 12), steps=st.integers(1, 7), rounds=st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_rounds_continue_where_the_last_one_ended(
    n: int, batch: int, steps: int, rounds: int
) -> None:
    """Short rounds together make the very sequence that one long round makes."""
    bounded = TrainConfig(batch_size=batch, epochs=99, max_steps=steps)
    pieces, epochs = [], []
    for round_ in range(1, rounds + 1):
        batches, numbers = train_steps(n, bounded, 5, "owner-0", round_)
        assert len(batches) == min(steps, 99 * -(-n // batch))
        pieces += [b.tolist() for b in batches]
        epochs += numbers
    whole = TrainConfig(batch_size=batch, epochs=99, max_steps=steps * rounds)
    batches, numbers = train_steps(n, whole, 5, "owner-0", 1)
    assert pieces[: len(batches)] == [b.tolist() for b in batches]
    assert epochs[: len(numbers)] == numbers
    counts = Counter(slot for piece in pieces for slot in piece)
    assert max(counts.values()) - min(counts.get(s, 0) for s in range(n)) <= 1


def test_max_steps_never_lengthens_a_round() -> None:
    config = TrainConfig(batch_size=4, epochs=1, max_steps=1000)
    assert len(train_steps(10, config, 0, "owner-0", 1)[0]) == 3


def test_the_plan_is_that_of_seed_and_owner() -> None:
    def plan(seed: int, owner: str, round_: int = 1) -> list[list[int]]:
        config = TrainConfig(batch_size=5)
        return [b.tolist() for b in train_steps(30, config, seed, owner, round_)[0]]

    assert plan(0, "owner-0") == plan(0, "owner-0")
    assert plan(0, "owner-0") != plan(1, "owner-0")
    assert plan(0, "owner-0") != plan(0, "owner-1")
    assert plan(0, "owner-0") != plan(0, "owner-0", 2)


@given(n=SIZES, batch=st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_evaluation_takes_every_sample_once_in_order(n: int, batch: int) -> None:
    steps = evaluation_steps(n, batch)
    assert [int(s) for step in steps for s in step] == list(range(n))
    assert all(len(step) <= 2 * batch for step in steps)


def test_slots_hide_the_order_of_the_file() -> None:
    """Slot numbers are visible: a file sorted by label must not tell labels by slot."""
    n = 400
    secrets = [OwnerSecret.for_simulation(seed, "owner-0") for seed in range(20)]
    orders = [slot_order(secret, "train", n) for secret in secrets]
    for order in orders:
        assert sorted(order.tolist()) == list(range(n))
    # A rank correlation of independent orders has standard deviation 1/sqrt(n - 1) = 0.05.
    correlations = [float(np.corrcoef(order, np.arange(n))[0, 1]) for order in orders]
    assert max(map(abs, correlations)) < 0.2
    assert abs(float(np.mean(correlations))) < 0.05
    assert (orders[0] == slot_order(secrets[0], "train", n)).all()
    assert (orders[0] != slot_order(secrets[0], "test", n)).any()
    assert (orders[0] != orders[1]).any()


# ---- samples ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tiny_bert: Path) -> object:
    return AutoTokenizer.from_pretrained(tiny_bert)


def test_slots_hold_texts_and_labels_in_the_given_order(tokenizer: object) -> None:
    order = np.array([2, 0, 1])
    samples = tokenise(
        tokenizer, ["w1", "w2 w3", "w4"], [0, 1, 2], max_tokens=16, classes=3, order=order
    )
    assert samples.labels is not None
    assert samples.labels.tolist() == [2, 0, 1]
    assert samples.ids[1].tolist() == [2, 5, 3]  # [CLS] w1 [SEP]
    assert samples.lengths == [3, 3, 4]
    assert samples.texts == tuple(text_identity(text) for text in ("w4", "w1", "w2 w3"))


def test_a_text_is_its_raw_bytes_whatever_its_tokens(tokenizer: object) -> None:
    whole, cut = (tokenise(tokenizer, ["w1  w2"], [0], max_tokens=n, classes=2) for n in (16, 3))
    assert whole.lengths != cut.lengths
    assert whole.texts == cut.texts != (text_identity("w1 w2"),)


def test_long_texts_are_cut(tokenizer: object) -> None:
    samples = tokenise(tokenizer, ["w1 " * 50], [0], max_tokens=6, classes=2)
    assert samples.lengths == [6]
    assert int(samples.ids[0][-1]) == 3


@pytest.mark.parametrize("label", [-1, 3, 99])
def test_labels_outside_the_agreed_classes(tokenizer: object, label: int) -> None:
    with pytest.raises(DataError, match=rf"a.csv:3: label={label}: must be in \[0, 3\)"):
        tokenise(
            tokenizer,
            ["w1", "w2"],
            [0, label],
            max_tokens=16,
            classes=3,
            order=np.array([1, 0]),
            places=["a.csv:2", "a.csv:3"],
        )


def test_no_texts(tokenizer: object) -> None:
    with pytest.raises(DataError, match="0 texts: must be >= 1"):
        tokenise(tokenizer, [], [], max_tokens=16, classes=3)


class Bare:
    """A tokenizer of one token per word, and no special ones."""

    def __init__(self, end: int | None) -> None:
        self.eos_token_id = end

    def __call__(self, texts: list[str], **options: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [[7] * len(text.split()) for text in texts]}


def test_a_short_text_is_filled_up_and_loses_nobody() -> None:
    """As many samples as texts, whatever a server's tokenizer makes of one of them."""
    samples = tokenise(Bare(9), ["a", "a b", "\u200b "], None, max_tokens=16, classes=3)
    assert [ids.tolist() for ids in samples.ids] == [[7, 9], [7, 7], [7, 9]]
    samples = tokenise(Bare(9), ["a", ""], [0, 0], max_tokens=16, classes=3)
    assert [ids.tolist() for ids in samples.ids] == [[7], [9]]


def test_a_short_text_is_named_where_its_owner_finds_it() -> None:
    options: Any = {"max_tokens": 16, "classes": 3, "order": np.array([1, 0])}
    places = ["notes.csv:2", "notes.csv:3"]
    with pytest.raises(DataError, match=r"notes.csv:3: 0 tokens: must be >= 1"):
        tokenise(Bare(None), ["a", ""], [0, 0], places=places, **options)
    with pytest.raises(DataError, match=r"notes.csv:2: 1 tokens: must be >= 2"):
        tokenise(Bare(None), ["a", "a b"], None, places=places, **options)


def test_a_text_of_two_parts_is_a_pair(tokenizer: object) -> None:
    samples = tokenise(tokenizer, ["w1 w2\x1fw3", "w1\x1fw1"], [0, 0], max_tokens=16, classes=2)
    # [CLS] w1 w2 [SEP] w3 [SEP]
    assert [ids.tolist() for ids in samples.ids] == [[2, 5, 6, 3, 7, 3], [2, 5, 3, 5, 3]]
    assert samples.texts[0] == text_identity("w1 w2\x1fw3")
    whole = tokenise(tokenizer, ["w1 " * 9 + "\x1fw3"], [0], max_tokens=8, classes=2)
    assert whole.ids[0].tolist()[-3:] == [3, 7, 3]  # the longer part is cut
    lines = tokenise(Bare(9), ["a b\x1fc"], None, max_tokens=16, classes=2)
    assert lines.ids[0].tolist() == [7, 7, 7]


def test_a_language_models_samples_have_no_labels(tokenizer: object) -> None:
    samples = tokenise(tokenizer, ["w1 w2"], None, max_tokens=16, classes=2)
    assert samples.labels is None
    assert isinstance(samples, Samples)
    assert torch.equal(samples.ids[0], torch.tensor([2, 5, 6, 3]))
