"""Entities in sequences of tags: equal to seqeval's, from counts that add up."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.entities import MODES, count, entities, of_sums, scores, to_sums, types_of

BIO = ("O", "B-person", "I-person", "B-place", "I-place", "I-a-b", "B-a-b")
IO = ("O", "I-person", "I-place")


def texts(names: tuple[str, ...]) -> st.SearchStrategy[list[list[tuple[int, int]]]]:
    pair = st.tuples(*[st.integers(0, len(names) - 1)] * 2)
    return st.lists(st.lists(pair, min_size=1, max_size=12), min_size=1, max_size=6)


@pytest.mark.parametrize(
    ("tags", "default", "strict"),
    [
        ("B-x I-x O", {("x", 0, 1)}, {("x", 0, 1)}),
        ("B-x B-x", {("x", 0, 0), ("x", 1, 1)}, {("x", 0, 0), ("x", 1, 1)}),
        ("O I-x I-x", {("x", 1, 2)}, set()),  # I- without B-
        ("B-x I-y I-y", {("x", 0, 0), ("y", 1, 2)}, {("x", 0, 0)}),
        ("B-x I-x", {("x", 0, 1)}, {("x", 0, 1)}),  # up to the text's end
        ("O", set(), set()),
    ],
)
def test_entities_of_one_text(tags: str, default: set[object], strict: set[object]) -> None:
    assert entities(tags.split()) == default
    assert entities(tags.split(), "strict") == strict


@settings(max_examples=60, deadline=None)
@given(texts(BIO))
def test_scores_equal_seqeval_of_bio_tags(drawn: list[list[tuple[int, int]]]) -> None:
    _equal_seqeval(BIO, drawn, strict="IOB2")


@settings(max_examples=60, deadline=None)
@given(texts(IO))
def test_scores_equal_seqeval_of_io_tags(drawn: list[list[tuple[int, int]]]) -> None:
    _equal_seqeval(IO, drawn, strict="IOB1")


def _equal_seqeval(names: tuple[str, ...], drawn: list[list[tuple[int, int]]], strict: str) -> None:
    metrics = pytest.importorskip("seqeval.metrics")
    schemes = pytest.importorskip("seqeval.scheme")
    sides = [[[pair[side] for pair in text] for text in drawn] for side in (0, 1)]
    words = [[[names[tag] for tag in text] for text in side] for side in sides]
    found = scores(count(names, *sides))
    for before, options in (
        ("", {}),
        ("strict-", {"mode": "strict", "scheme": getattr(schemes, strict)}),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of classes without entities
            for name in ("f1", "precision", "recall"):
                expected = getattr(metrics, f"{name}_score")(*words, zero_division=0, **options)
                assert found[f"{before}entity-{name}"] == pytest.approx(expected, abs=1e-12)
            macro = metrics.f1_score(*words, average="macro", zero_division=0, **options)
        assert found[f"{before}entity-macro-f1"] == pytest.approx(np.nan_to_num(macro), abs=1e-12)


def _conlleval(tags: list[str]) -> set[tuple[str, int, int]]:
    """Return entities by conlleval's questions: does one end here, does one begin here?"""
    found, open_at = set(), None
    before = ("O", "")
    for at, tag in enumerate([*tags, "O"]):
        mark, _, kind = tag.partition("-")
        inside = mark == "I" and before[0] in "BI" and before[1] == kind
        if before[0] != "O" and not inside:
            found.add((before[1], open_at, at - 1))
        if mark != "O" and not inside:
            open_at = at
        before = (mark, kind)
    return found


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(BIO), max_size=14))
def test_entities_equal_conllevals(tags: list[str]) -> None:
    assert entities(tags) == _conlleval(tags)
    # Strictly: those that begin with B-; an I- that begins one elsewhere is none.
    strict = {one for one in _conlleval(tags) if tags[one[1]].startswith("B-")}
    assert entities(tags, "strict") == strict


@settings(max_examples=60, deadline=None)
@given(texts(BIO))
def test_scores_are_those_of_the_sets_of_entities(drawn: list[list[tuple[int, int]]]) -> None:
    sides = [[[pair[side] for pair in text] for text in drawn] for side in (0, 1)]
    true, told = (
        {(n, *one) for n, text in enumerate(side) for one in _conlleval([BIO[t] for t in text])}
        for side in sides
    )
    found = scores(count(BIO, *sides))

    assert found["entity-precision"] == pytest.approx(len(true & told) / max(len(told), 1))
    assert found["entity-recall"] == pytest.approx(len(true & told) / max(len(true), 1))
    both = len(true) + len(told)
    assert found["entity-f1"] == pytest.approx(2 * len(true & told) / max(both, 1))


@settings(max_examples=40, deadline=None)
@given(texts(BIO), texts(BIO))
def test_owners_counts_add_up_to_those_of_all_texts(
    one: list[list[tuple[int, int]]], other: list[list[tuple[int, int]]]
) -> None:
    def counted(drawn: list[list[tuple[int, int]]]) -> np.ndarray:
        return count(BIO, *([[pair[side] for pair in text] for text in drawn] for side in (0, 1)))

    sums: dict[str, float] = {}
    for drawn in (one, other):
        for key, value in to_sums(counted(drawn)).items():
            sums[key] = sums.get(key, 0.0) + value
    assert np.array_equal(of_sums(sums, len(types_of(BIO))), counted([*one, *other]))


def test_two_readings_of_tags_without_b_are_one() -> None:
    counts = count(IO, [[1, 1, 0, 2]], [[1, 0, 2, 2]])
    assert len(counts) == len(MODES)
    assert np.array_equal(counts[0], counts[1])


@pytest.mark.parametrize(
    "names", [("NOUN", "VERB"), ("O", "B-x", "NOUN"), ("B-x", "I-x"), ("O",), ("O", "S-x")]
)
def test_other_tags_are_of_no_entities(names: tuple[str, ...]) -> None:
    assert types_of(names) == ()


def test_types_come_in_the_order_of_the_names() -> None:
    assert types_of(("O", "I-b", "B-a", "I-a", "B-b")) == ("b", "a")
