"""Contributing token identification: what is chosen, the cap, and what the owner is told."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.errors import ConfigError, DataError
from fedsplit.privacy.contributing_tokens import (
    PUBLIC_STATISTICS,
    STATISTICS,
    PublicCounts,
    count_tokens,
    purity,
    select_contributing_tokens,
    tfidf,
)

CLS, SEP = 0, 1
COMMON, GOOD, BAD, RARE = 2, 3, 4, 5


def corpus() -> tuple[list[list[int]], list[int]]:
    """200 samples: a common word everywhere, one pure word per class in a quarter of them."""
    rng = np.random.default_rng(0)
    samples, labels = [], []
    for i in range(200):
        label = i % 2
        ids = [CLS, *[COMMON] * 3, *rng.integers(10, 60, 6).tolist()]
        if i % 8 < 2:
            ids.append(GOOD if label else BAD)
        if i == 0:
            ids.append(RARE)
        samples.append([*ids, SEP])
        labels.append(label)
    return samples, labels


def test_tfidf_follows_the_formula():
    _, counts = count_tokens([[2, 2, 3], [3, 4]], [0, 1])

    score = tfidf(counts)

    assert score[0, 2] == pytest.approx(2 / 3 * np.log(2 / 2))
    assert score[0, 3] == pytest.approx(1 / 3 * np.log(2 / 3))
    assert score[1, 4] == pytest.approx(1 / 2 * np.log(2 / 2))


def test_purity_prefers_the_words_that_tell_the_class():
    samples, labels = corpus()

    chosen = select_contributing_tokens(
        samples, labels, statistic="purity", max_share=0.05, special_ids=[CLS, SEP]
    )

    assert chosen.per_class[0][0][0] == BAD
    assert chosen.per_class[1][0][0] == GOOD
    assert COMMON not in chosen.token_ids


def test_purity_does_not_trust_a_word_seen_once():
    _, counts = count_tokens(*corpus())

    score = purity(counts)

    assert score[0, BAD] > 0.3 > score[0, RARE]
    assert score[0, COMMON] < 0


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=8), min_size=2, max_size=12),
    st.floats(0, 1),
    st.sampled_from(sorted({**STATISTICS, **PUBLIC_STATISTICS})),
)
def test_share_stays_within_the_cap(samples: list[list[int]], cap: float, statistic: str):
    labels = [i % 2 for i in range(len(samples))]
    special = {0, 1}
    running = [t for ids in samples for t in ids if t not in special]
    if not running:
        return

    chosen = select_contributing_tokens(
        samples,
        None if statistic in PUBLIC_STATISTICS else labels,
        statistic=statistic,
        max_share=cap,
        min_count=1,
        special_ids=special,
        public=[[2, 3, 3, 7], [2, 9]],
    )

    touched = sum(t in chosen.token_ids for t in running)
    assert touched / len(running) <= cap + 1e-12
    assert chosen.running_share == pytest.approx(touched / len(running))
    assert chosen.vocabulary_share == pytest.approx(len(chosen.token_ids) / len(set(running)))
    assert not chosen.token_ids & special


def test_m_caps_tokens_per_class():
    samples, labels = corpus()

    chosen = select_contributing_tokens(samples, labels, statistic="tfidf", m=2, max_share=1.0)

    assert all(len(row) <= 2 for row in chosen.per_class.values())


def test_multipliers():
    samples, labels = corpus()
    chosen = select_contributing_tokens(samples, labels, m=1, max_share=0.05)

    scale = chosen.multipliers(torch.tensor([GOOD, COMMON, BAD]), 0.25)

    assert scale.tolist() == [0.25, 1.0, 0.25]
    with pytest.raises(ConfigError, match=r"rho=-0\.1"):
        chosen.multipliers(torch.tensor([1]), -0.1)


def test_owner_is_told_what_is_lost():
    chosen = select_contributing_tokens(*corpus(), m=1, max_share=0.05)

    assert "in the clear" in chosen.statement(0.0)
    assert "privacy parameter by 4" in chosen.statement(0.25)
    assert "private labels" in chosen.statement(0.25)
    assert json.loads(json.dumps(chosen.to_dict()))["statistic"] == "purity"


def test_misuse_is_refused():
    with pytest.raises(ConfigError, match="statistic='nope'"):
        select_contributing_tokens(*corpus(), statistic="nope")
    with pytest.raises(ConfigError, match=r"max_share=1\.5"):
        select_contributing_tokens(*corpus(), max_share=1.5)
    with pytest.raises(DataError, match="labels=1"):
        select_contributing_tokens([[1], [2]], [0])
    with pytest.raises(DataError, match="0 tokens"):
        select_contributing_tokens([[0], [1]], [0, 1], special_ids=[0, 1])


PUBLIC = [[COMMON, 7, 7], [COMMON, 8], [COMMON, GOOD, 7], [9]]


def test_public_counts_are_counts():
    counts = PublicCounts.over(PUBLIC, 10)

    assert (counts.documents[COMMON], counts.documents[7], counts.texts) == (3, 2, 4)
    assert counts.tokens[7] == 3
    assert np.exp(-counts.surprisal()).sum() == pytest.approx(1.0)
    assert counts.surprisal()[7] < counts.surprisal()[8]
    assert PublicCounts.over([[50]], 10).tokens.sum() == 0  # ids that the owner lacks


def chosen(statistic: str, **options):
    samples, labels = corpus()
    return select_contributing_tokens(
        samples, labels, statistic=statistic, special_ids=[CLS, SEP], public=PUBLIC, **options
    )


def test_frequent_is_the_order_of_public_text():
    assert list(chosen("frequent", m=1, max_share=1.0).token_ids) == [COMMON]
    # The commonest does not fit a small cap: then the next one that does, never a rarer choice.
    assert list(chosen("frequent", max_share=0.05).token_ids) == [GOOD]


def test_public_idf_prefers_words_of_the_owners_field():
    first = chosen("public-idf", m=1, max_share=1.0).token_ids

    assert COMMON not in first  # common here, and everywhere else too
    assert not first & {7, 8, 9}


@pytest.mark.parametrize("statistic", PUBLIC_STATISTICS)
def test_choices_against_public_text_do_not_know_the_labels(statistic: str):
    samples, labels = corpus()
    options = {"statistic": statistic, "special_ids": [CLS, SEP], "public": PUBLIC}

    one = select_contributing_tokens(samples, labels, **options)
    other = select_contributing_tokens(samples, [1 - x for x in labels], **options)
    none = select_contributing_tokens(samples, None, **options)

    assert one.to_dict() == other.to_dict() == none.to_dict()
    assert "not from the labels" in one.statement(0.5)
    assert "private labels" not in one.statement(0.5)


def test_what_a_touched_token_tells_is_its_public_surprisal():
    found = chosen("frequent", m=1, max_share=1.0)

    counts = PublicCounts.over(PUBLIC, 60)
    assert found.surprisal == pytest.approx(float(counts.surprisal()[COMMON]), rel=0.05)
    assert f"{found.surprisal:.1f} nats" in found.statement(0.0)


def test_the_budget_is_spent_past_tokens_that_do_not_fit():
    """A class whose best token is too common takes its next one."""
    samples = [[2, 2, 2, 3], [2, 2, 2, 3], [4, 5], [4, 6]] * 10
    labels = [0, 0, 1, 1] * 10

    found = select_contributing_tokens(samples, labels, statistic="purity", max_share=0.4)

    assert 2 not in found.token_ids
    assert 3 in found.token_ids


def test_misuse_of_public_statistics_is_refused():
    with pytest.raises(DataError, match="public texts=0"):
        select_contributing_tokens(*corpus(), statistic="frequent")
    with pytest.raises(ConfigError, match="must be one of frequent, public-idf where"):
        select_contributing_tokens(corpus()[0], None, statistic="tfidf")
