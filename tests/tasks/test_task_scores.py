"""What owners' added numbers score is what scipy and scikit-learn say of the pooled predictions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.rank_counts import rank_correlation
from fedsplit.sums import Family, add_up, is_sum
from fedsplit.tasks.multi_label import MultiLabel
from fedsplit.tasks.regression import STEPS, Regression

NUMBER = st.floats(-1.25, 1.25, width=32)
PAIRS = st.lists(st.tuples(st.floats(0, 5, width=32), NUMBER), min_size=2, max_size=40)
SCALE = Regression(1, 0.0, 5.0)


def told(rows: list[tuple[float, float]]) -> tuple[dict[str, float], list[float], list[float]]:
    """Return (sums of one owner, labels, predictions in the labels' unit)."""
    labels, raw = (list(side) for side in zip(*rows, strict=True))
    scores = torch.tensor(raw)[:, None]
    targets = SCALE.tensor(labels, [""] * len(rows))
    sums = SCALE.count(scores, targets, [1] * len(rows))
    return sums, labels, [answer["value"] for answer in SCALE.answers(scores, ())]


@settings(max_examples=80, deadline=None)
@given(owners=st.lists(PAIRS, min_size=1, max_size=4))
@pytest.mark.filterwarnings("ignore")
def test_numbers_score_as_scipy_on_pooled_predictions(
    owners: list[list[tuple[float, float]]],
) -> None:
    stats = pytest.importorskip("scipy.stats")
    parts = [told(rows) for rows in owners]
    labels, values = ([x for part in parts for x in part[side]] for side in (1, 2))
    found = SCALE.scores(add_up(part[0] for part in parts))
    spread = min(max(side) - min(side) for side in (labels, values))
    square = sum((a - b) ** 2 for a, b in zip(labels, values, strict=True)) / len(labels)
    assert found["rmse"] == pytest.approx(math.sqrt(square), abs=1e-4)
    if spread < 1e-2:
        return
    assert found["pearson"] == pytest.approx(stats.pearsonr(labels, values).statistic, abs=1e-3)
    exact = float(stats.spearmanr(labels, values).statistic)
    if not math.isnan(exact):
        assert abs(found["spearman"] - exact) <= found["spearman-error"] + 1e-9


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(0, STEPS), st.integers(0, STEPS)), min_size=2))
@pytest.mark.filterwarnings("ignore")
def test_values_that_are_levels_have_an_exact_coefficient(rows: list[tuple[int, int]]) -> None:
    stats = pytest.importorskip("scipy.stats")
    counts: dict[tuple[int, int], float] = {}
    for pair in rows:
        counts[pair] = counts.get(pair, 0.0) + 1.0
    expected = float(stats.spearmanr(*zip(*rows, strict=True)).statistic)
    if math.isnan(expected):  # one side is constant
        assert rank_correlation(counts) == (0.0, 1.0)
    else:
        assert rank_correlation(counts)[0] == pytest.approx(expected, abs=1e-9)


def test_many_pairs_leave_little_error() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    label = 5 * torch.rand(1400, generator=generator)
    score = (label / 2.5 - 1) * 0.8 + 0.25 * torch.randn(1400, generator=generator)
    sums, labels, values = told(list(zip(label.tolist(), score.tolist(), strict=True)))
    found = SCALE.scores(sums)
    exact = float(stats.spearmanr(labels, values).statistic)
    assert abs(found["spearman"] - exact) < 2e-3
    assert found["spearman-error"] < 0.03
    assert found["pearson"] == pytest.approx(stats.pearsonr(labels, values).statistic, abs=1e-6)


SETS = st.lists(
    st.tuples(
        st.lists(st.booleans(), min_size=4, max_size=4),
        st.lists(st.booleans(), min_size=4, max_size=4),
    ),
    min_size=1,
    max_size=20,
)


@settings(max_examples=60, deadline=None)
@given(owners=st.lists(SETS, min_size=1, max_size=3))
@pytest.mark.filterwarnings("ignore")
def test_sets_score_as_scikit_learn_on_pooled_predictions(owners: list[Any]) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    task, sums, right = MultiLabel(4), [], 0
    for rows in owners:
        targets = torch.tensor([row[0] for row in rows]).float()
        scores = torch.tensor([row[1] for row in rows]).float() - 0.5
        sums.append(task.count(scores, targets, [1] * len(rows)))
        right += int(task.right(scores, targets).sum())
    true, said = ([row[side] for rows in owners for row in rows] for side in (0, 1))
    found = task.scores(add_up(sums))
    for average in ("micro", "macro"):
        expected = metrics.f1_score(true, said, average=average, zero_division=0)
        assert found[f"{average}-f1"] == pytest.approx(expected)
    each = {"average": None, "zero_division": 0}
    assert found["recalls"] == pytest.approx(list(metrics.recall_score(true, said, **each)))
    assert found["precisions"] == pytest.approx(list(metrics.precision_score(true, said, **each)))
    assert right / len(true) == pytest.approx(metrics.accuracy_score(true, said))


def test_what_adds_up_and_what_a_report_may_hold() -> None:
    assert all(map(is_sum, ("confusion-0-31", "right-7", "moment-0-2", "level-50-50")))
    assert not any(map(is_sum, ("loss", "dp-steps", "right-07", "right--1", "x-1", "a-1-2-3")))
    counts = Family("level", (3, 3), all_targets=True)
    moments = Family("moment", (3, 3), whole=False)
    assert counts.has("level-2-2")
    assert not counts.has("level-3-0")
    assert not counts.has("level-2")
    assert counts.fault({"level-0-0": 2.0, "level-1-0": 3.0}, 5) is None
    assert "5 in all" in str(counts.fault({"level-0-0": 2.0}, 5))
    assert "whole number" in str(counts.fault({"level-0-0": 2.5, "level-0-1": 2.5}, 5))
    assert moments.fault({"moment-1-0": -5.0}, 5) is None
    assert "must be in [-5, 5]" in str(moments.fault({"moment-1-0": -5.1}, 5))
    assert add_up([{"right-1": 1.0, "loss": 2.0}, {"right-1": 2.0}]) == {"right-1": 3.0}


def test_lies_make_no_coefficient_outside_its_range() -> None:
    sums = {
        "level-0-0": 5.0,
        "level-1-1": 5.0,
        "moment-2-0": 0.1,
        "moment-0-2": 0.1,
        "moment-1-1": 9.0,
    }
    found = SCALE.scores(sums)
    assert -1.0 <= found["pearson"] <= 1.0
    assert found["spearman"] == pytest.approx(1.0)
    assert all(math.isfinite(value) for value in found.values())
