"""Which additive numbers of a report leave, by an owner's rules and without any."""

from __future__ import annotations

from typing import Any

import pytest

from fedsplit.owners.ledger.reports import sums_that_leave
from fedsplit.owners.policy.rules import Policy

CLASSES = {"confusion-0-0": 20.0, "confusion-1-1": 20.0}
FINER = {"levels-0-3": 20.0, "levels-1-40": 20.0, "entities-0-1": 3.0}
REPORT = {"loss": 0.3, "targets": 40.0, **CLASSES, **FINER}


@pytest.mark.parametrize(
    ("rules", "leaving"),
    [
        ({}, CLASSES),
        ({"min_texts": 1}, {}),
        ({"counts": True}, {**CLASSES, **FINER}),
        ({"counts": True, "epsilon": 1.0}, {}),
        ({"counts": True, "allow": False}, {}),
    ],
)
def test_finer_counts_than_those_of_classes_need_a_rule(
    monkeypatch: pytest.MonkeyPatch, rules: dict[str, Any], leaving: dict[str, float]
) -> None:
    monkeypatch.delenv("FEDSPLIT_SIMULATION", raising=False)

    assert sums_that_leave(Policy(rules and {"reports": rules}), REPORT) == set(leaving)


def test_simulated_owners_report_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSPLIT_SIMULATION", "1")

    assert sums_that_leave(Policy({}), REPORT) == {*CLASSES, *FINER}
