"""Scores from counts are those of the pooled predictions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.confusion import coarse, is_count, of_reports, recalls, scores, to_report

ROWS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60)


def table(rows: list[tuple[int, int]]) -> np.ndarray:
    counts = np.zeros((5, 5), dtype=np.int64)
    for i, j in rows:
        counts[i, j] += 1
    return counts


@settings(max_examples=60, deadline=None)
@given(owners=st.lists(ROWS, min_size=1, max_size=4))
@pytest.mark.filterwarnings("ignore")
def test_owners_counts_score_as_scikit_learn_on_their_pooled_predictions(
    owners: list[list[tuple[int, int]]],
) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    pooled = [row for rows in owners for row in rows]
    true, said = (list(side) for side in zip(*pooled, strict=True))
    counts = of_reports([to_report(table(rows)) for rows in owners], 5)
    found = scores(counts)
    assert found == {
        "accuracy": pytest.approx(metrics.accuracy_score(true, said)),
        "balanced-accuracy": pytest.approx(metrics.balanced_accuracy_score(true, said)),
        "macro-f1": pytest.approx(metrics.f1_score(true, said, average="macro", zero_division=0)),
        "micro-f1": pytest.approx(metrics.f1_score(true, said, average="micro")),
        "mcc": pytest.approx(metrics.matthews_corrcoef(true, said)),
    }
    expected = metrics.recall_score(true, said, labels=range(5), average=None, zero_division=0)
    assert recalls(counts) == pytest.approx(expected)
    assert (counts == metrics.confusion_matrix(true, said, labels=range(5))).all()


def test_by_hand() -> None:
    counts = np.array([[3, 1], [2, 4]])
    found = scores(counts)
    assert found["macro-f1"] == pytest.approx((6 / 9 + 8 / 11) / 2)
    assert found["mcc"] == pytest.approx((3 * 4 - 1 * 2) / np.sqrt(5 * 5 * 4 * 6))
    assert recalls(counts) == pytest.approx([3 / 4, 4 / 6])
    assert scores(np.zeros((2, 2), dtype=np.int64)) == {}


def test_what_is_a_count() -> None:
    assert is_count("confusion-0-31")
    for other in ("confusion-0-32", "confusion-00-1", "confusion--1-0", "loss", "confusion-1-2-3"):
        assert not is_count(other)


@settings(max_examples=60, deadline=None)
@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=60), lone=st.integers(0, 59))
def test_a_text_that_alone_is_taken_for_a_class_is_not_told(labels: list[int], lone: int) -> None:
    # Whoever chooses the predictions has one text alone in its column: its row is its label.
    lone %= len(labels)
    crafted = to_report(table([(y, 4 if i == lone else 0) for i, y in enumerate(labels)]))
    assert not coarse(crafted)
    honest = to_report(table([(y, 0) for y in labels]))
    assert coarse(honest) is (len(labels) >= 20)
