"""Sliding windows predict every token once; intervals hold what they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.errors import ConfigError, DataError
from fedsplit.evaluation.perplexity import Model, summed, text_loss, windows
from tests.emulators.emulator_families import VOCAB, tiny


@given(length=st.integers(2, 300), window=st.integers(2, 60), data=st.data())
def test_every_token_but_the_first_is_predicted_once(
    length: int, window: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, window - 1))

    places = list(windows(length, window, stride))

    predicted = [p for _, end, first in places for p in range(first, end)]
    assert predicted == list(range(1, length))
    for start, end, first in places:
        assert end - start == min(window, length)
        assert start < first
        # The promised context, where the text has it.
        assert first - start >= min(window - stride, first)


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny("llama")


@settings(max_examples=15, deadline=None)
@given(length=st.integers(2, 40), window=st.integers(2, 20), batch=st.integers(1, 5))
def test_losses_are_those_of_each_window_alone(
    model: Model, length: int, window: int, batch: int
) -> None:
    ids = torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(length))
    stride = max(1, window // 2)
    expected = 0.0
    for start, end, first in windows(length, window, stride):
        with torch.no_grad():
            logits = model(input_ids=ids[None, start:end], use_cache=False).logits[0]
        log_p = torch.log_softmax(logits.double(), -1)
        expected -= sum(float(log_p[p - start - 1, ids[p]]) for p in range(first, end))

    found = text_loss(model, ids, window=window, stride=stride, batch_size=batch)

    assert found.tokens == length - 1
    assert found.nats == pytest.approx(expected / (length - 1), rel=1e-4)
    assert found.perplexity == pytest.approx(math.exp(found.nats))


def test_a_text_within_one_window_is_the_plain_mean(model: Model) -> None:
    ids = torch.randint(3, VOCAB, (30,), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = float(model(input_ids=ids[None], labels=ids[None], use_cache=False).loss)

    found = text_loss(model, ids)

    assert found.nats == pytest.approx(expected, rel=1e-5)
    assert found.interval is None


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(50, 150, (400, 20)).astype(float)
    # Blocks differ by more than their tokens do: an interval over tokens would be too narrow.
    nats = tokens * (3.0 + rng.normal(0, 0.3, tokens.shape))

    covered = 0
    for i in range(400):
        low, high = summed(nats[i], tokens[i]).interval or (0.0, 0.0)
        covered += low <= 3.0 <= high

    assert 0.92 <= covered / 400 <= 0.98


def test_training_mode_and_dropout_do_not_matter(model: Model) -> None:
    ids = torch.arange(3, 40)
    before = text_loss(model, ids).nats
    noisy = tiny("llama", attention_dropout=0.5)
    noisy.load_state_dict(model.state_dict())
    noisy.train()

    assert text_loss(noisy, ids).nats == before
    assert noisy.training


@pytest.mark.parametrize(("window", "stride"), [(1, 1), (8, 8), (8, 0)])
def test_bounds_of_windows(window: int, stride: int) -> None:
    with pytest.raises(ConfigError):
        list(windows(20, window, stride))


@pytest.mark.parametrize("ids", [torch.tensor([1]), torch.tensor([1, VOCAB]), torch.ones(2, 3)])
def test_what_is_no_text_is_refused(model: Model, ids: torch.Tensor) -> None:
    with pytest.raises(DataError):
        text_loss(model, ids)
