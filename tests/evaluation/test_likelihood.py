"""Batching, sorting and cached prefixes change no likelihood."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.emulators import EmulatorPlan, build_emulator
from fedsplit.emulators.importance.harmonizer import make_harmonizers
from fedsplit.errors import ConfigError, DataError
from fedsplit.evaluation.likelihood import Likelihood
from fedsplit.evaluation.perplexity import Model
from tests.emulators.emulator_families import FAMILIES, VOCAB, tiny

IDS = st.lists(st.integers(3, VOCAB - 1), min_size=1, max_size=12)
PAIRS = st.lists(st.tuples(IDS, IDS), min_size=1, max_size=8)


def by_hand(model: Model, context: list[int], tail: list[int]) -> tuple[float, bool]:
    """One sequence, one forward pass, one position at a time."""
    ids = torch.tensor([[*context, *tail]])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0].double()
    places = range(len(context) - 1, len(context) + len(tail) - 1)
    nats = sum(
        float(torch.log_softmax(logits[p], 0)[token]) for p, token in zip(places, tail, strict=True)
    )
    greedy = all(int(logits[p].argmax()) == t for p, t in zip(places, tail, strict=True))
    return nats, greedy


def questions(count: int = 6, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Contexts of a few lengths, each with some continuations."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> list[int]:
        return torch.randint(3, VOCAB, (n,), generator=generator).tolist()

    contexts = [draw(5 + i % 3) for i in range(count)]
    return [(context, draw(1 + j)) for context in contexts for j in range(3)]


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny("llama")


@settings(max_examples=25, deadline=None)
@given(pairs=PAIRS, batch=st.integers(1, 60), cache=st.booleans())
def test_whatever_the_batches_the_score_is_that_of_the_pair_alone(
    model: Model, pairs: list[tuple[list[int], list[int]]], batch: int, cache: bool
) -> None:
    found = Likelihood(model, batch_tokens=batch, cache=cache).score(pairs + pairs[:1])

    for (context, tail), score in zip(pairs + pairs[:1], found, strict=True):
        nats, greedy = by_hand(model, context, tail)
        assert score.nats == pytest.approx(nats, abs=1e-3)
        assert score.greedy == greedy


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_cached_prefix_changes_nothing_in_any_family(family: str) -> None:
    model = tiny(family)
    pairs = questions()

    plain = Likelihood(model, cache=False).score(pairs)
    cached = Likelihood(model, batch_tokens=40).score(pairs)

    assert [s.nats for s in cached] == pytest.approx([s.nats for s in plain], rel=1e-3, abs=1e-3)


def test_a_cached_prefix_saves_what_choices_share(model: Model) -> None:
    generator = torch.Generator().manual_seed(0)
    contexts = torch.randint(3, VOCAB, (60, 24), generator=generator).tolist()
    pairs = [(context, [3 + j, 4]) for context in contexts for j in range(4)]
    plain, cached = Likelihood(model, cache=False), Likelihood(model)

    plain.score(pairs)
    cached.score(pairs)

    assert cached.cached
    assert cached.forwarded < 0.5 * plain.forwarded


def test_an_emulator_whose_blocks_keep_no_keys_is_run_without() -> None:
    base = tiny("llama")
    roles = ("harmonizer", "adapter", "keep", "harmonizer", "keep", "adapter")
    bridges = dict(enumerate(make_harmonizers(base)))
    emulator = build_emulator(base, EmulatorPlan(roles), harmonizers=bridges)
    pairs = questions()

    found = Likelihood(emulator.model).score(pairs)

    for (context, tail), score in zip(pairs, found, strict=True):
        assert score.nats == pytest.approx(by_hand(emulator.model, context, tail)[0], abs=1e-3)


def test_a_long_context_loses_its_beginning(model: Model) -> None:
    context, tail = list(range(3, 30)), [5, 6]

    (score,) = Likelihood(model, max_length=8).score([(context, tail)])

    assert score.nats == pytest.approx(by_hand(model, context[-7:], tail)[0], abs=1e-3)


def test_likelihoods_of_all_next_tokens_sum_to_one(model: Model) -> None:
    scores = Likelihood(model).score([([4, 9, 12], [token]) for token in range(VOCAB)])

    total = torch.tensor([s.nats for s in scores]).double().exp().sum()
    assert float(total) == pytest.approx(1.0, abs=1e-4)
    assert sum(s.greedy for s in scores) == 1


@pytest.mark.parametrize(
    "pair", [([], [1]), ([1], []), ([VOCAB], [1]), ([1], [-1]), ([1], [4] * 9)]
)
def test_what_cannot_be_scored_is_named(model: Model, pair: tuple[list[int], list[int]]) -> None:
    with pytest.raises(DataError):
        Likelihood(model, max_length=8).score([pair])


def test_bounds() -> None:
    with pytest.raises(ConfigError, match="batch_tokens=0"):
        Likelihood(tiny("llama"), batch_tokens=0)
