"""Rows of ``poison``: who is named, what is a false alarm, whose loss is compared."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedsplit.errors import RunError
from fedsplit.wire.messages import WEIGHTS, weights_record
from simulations.poison.federations import blamed_in, loss_without, row_of
from simulations.poison.liars import LIES, LyingGrid


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


def test_owners_whose_changes_weighed_less_are_counted_apart_from_the_named() -> None:
    parts = {"owner-0": {"alike": 0.4}, "owner-1": {"alike": 0.9}, "owner-2": {"weighed": 5.0}}
    row = row_of({"rounds": [round_of(contributions=parts), EVALUATED]}, {"owner-0"}, 2)
    assert (row["alike"], row["alike_honest"]) == (1, 1)
    assert (row["named"], row["false_alarms"]) == (0, 0)


def test_a_disguised_liars_changes_are_longer_and_hardly_alike() -> None:
    start = {"w": np.linspace(-1, 1, 4000, dtype=np.float32)}
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    sent, lying = [], LyingGrid(LIES["disguised backdoor"], frozenset({0, 1}))
    asked = Message(RecordDict({WEIGHTS: weights_record(start)}), 17, "train")
    for _ in range(2):
        reply = Message(
            RecordDict({WEIGHTS: weights_record({"w": start["w"] + 0.01})}), reply_to=asked
        )
        lying.change(asked, reply)
        sent.append(reply.content.array_records[WEIGHTS]["w"].numpy() - start["w"])
    sizes = [float(np.linalg.norm(change)) for change in sent]
    cosine = float(sent[0] @ sent[1]) / (sizes[0] * sizes[1])
    honest = 0.01 * 4000**0.5
    assert all(1.7 < size / honest < 1.9 for size in sizes)
    assert 0.2 < cosine < 0.4


def test_the_honest_loss_is_of_the_owners_that_do_not_lie() -> None:
    row = row_of({"rounds": [EVALUATED]}, set(), 1)
    assert loss_without(row, 1) == pytest.approx(3.5)
    assert loss_without(row, 0) == pytest.approx(4.6)
    with pytest.raises(RunError, match="never evaluated"):
        row_of({"rounds": []}, set(), 1)
