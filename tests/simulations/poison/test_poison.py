"""Rows of ``poison``: who is named, what is a false alarm, whose loss is compared."""

from __future__ import annotations

from typing import Any

import pytest

from fedsplit.errors import RunError
from simulations.poison.federations import blamed_in, loss_without, row_of


def round_of(**lineage: Any) -> dict[str, Any]:
    return {"train": {"lost": {}}, "lineage": {"verdict": "in_lineage", **lineage}}


EVALUATED = {
    "evaluate": {
        "metrics": {
            "owners": {
                "owner-0": {"loss": 9.0, "targets": 10.0},
                "owner-1": {"loss": 2.0, "targets": 10.0},
                "owner-2": {"loss": 4.0, "targets": 30.0},
            }
        }
    }
}


def test_liars_are_named_and_honest_owners_that_are_blamed_are_false_alarms() -> None:
    rounds = [
        round_of(charged={"owner-0": "its norm"}),
        round_of(owners={"owner-1": {"action": "quarantine"}, "owner-2": {"action": "accept"}}),
        {"train": {"lost": {"owner-2": "gone"}}},
        EVALUATED,
    ]
    assert blamed_in(rounds[1]) == {"owner-1"}
    row = row_of({"rounds": rounds}, {"owner-0"}, 4)
    assert row["named"] == 1
    assert row["false_alarms"] == 2
    assert row["loss"] == pytest.approx(3.5)
    assert row["trigger"] == 9.0


def test_a_refused_honest_average_is_a_false_alarm() -> None:
    rounds = [{"lineage": {"verdict": "not_shown"}}, EVALUATED]
    assert row_of({"rounds": rounds}, set(), 2)["false_alarms"] == 1
    assert row_of({"rounds": rounds}, {"owner-0"}, 2)["false_alarms"] == 0


def test_the_honest_loss_is_of_the_owners_that_do_not_lie() -> None:
    row = row_of({"rounds": [EVALUATED]}, set(), 1)
    assert loss_without(row, 1) == pytest.approx(3.5)
    assert loss_without(row, 0) == pytest.approx(4.6)
    with pytest.raises(RunError, match="never evaluated"):
        row_of({"rounds": []}, set(), 1)
