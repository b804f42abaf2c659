"""The area under the ROC curve from counts is scikit-learn's, within the bound that it states."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.score_levels import FAMILY, LEVELS, RANGE, area, to_report
from fedsplit.sums import add_up

metrics = pytest.importorskip("sklearn.metrics")
texts = st.lists(
    st.tuples(st.integers(0, 1), st.floats(-20, 20, allow_nan=False)), min_size=2, max_size=80
)


@settings(max_examples=80, deadline=None)
@given(texts, texts)
def test_the_area_of_all_owners_texts_is_within_its_bound(
    one: list[tuple[int, float]], other: list[tuple[int, float]]
) -> None:
    reports = []
    for own in (one, other):
        classes, scores = (np.array(side) for side in zip(*own, strict=True))
        reports.append(to_report(classes.astype(np.int64), scores))
        assert FAMILY.fault(reports[-1], len(own)) is None
    classes, scores = (np.array(side) for side in zip(*one, *other, strict=True))

    found = area(add_up(reports))

    if len(set(classes.tolist())) < 2:
        assert found is None
        return
    assert found is not None
    exact = metrics.roc_auc_score(classes, scores)
    assert abs(found[0] - exact) <= found[1] + 1e-12
    edges = np.linspace(-RANGE, RANGE, LEVELS - 1)
    levels = np.searchsorted(edges, scores, side="right")
    assert found[0] == pytest.approx(metrics.roc_auc_score(classes, levels))


def test_scores_that_levels_tell_apart_have_an_exact_area() -> None:
    found = area(to_report(np.array([0, 0, 1, 1]), np.array([-9.0, 1.0, 0.0, 9.0])))

    assert found == (0.75, 0.0)
