"""Liars that do not lie as others do: now and then, by standing still, with one number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, Message

from fedsplit.errors import WireError
from fedsplit.wire.messages import WEIGHTS
from fedsplit.wire.replies import REPLIES
from tests.strategies.failing import VICTIM
from tests.strategies.rounds.test_failures_replies import replies_of
from tests.strategies.rounds.test_poisoned_rounds import OFFSITE, rounds_of, scaled

LIAR = f"owner-{VICTIM}"


def alternately(lie: Callable[[Message], None]) -> Callable[[Message], None]:
    calls: list[int] = []

    def change(reply: Message) -> None:
        calls.append(1)
        if len(calls) % 2:
            lie(reply)

    return change


def test_lies_in_every_second_round_are_named_each_time_and_benched(
    offsite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replies_of(monkeypatch, VICTIM, alternately(scaled))
    rows = rounds_of(offsite(**OFFSITE), tmp_path)
    assert [sorted(row["lineage"]["charged"]) for row in rows] == [[LIAR], [], [LIAR], []]
    assert not any(row["train"]["benched"] for row in rows[:3])
    assert "charged in 2 rounds, last in 3: norm of" in rows[3]["train"]["benched"][LIAR]


def replayed(late: int) -> Callable[[Message], None]:
    """Return what replies with the update of ``late`` rounds ago; 0: of the first, for ever."""
    kept: list[dict[str, Array]] = []

    def change(reply: Message) -> None:
        record = reply.content.array_records[WEIGHTS]
        kept.append(dict(record.items()))
        for name, array in kept[max(0, len(kept) - 1 - late) if late else 0].items():
            record[name] = array

    return change


@pytest.mark.parametrize("late", [0, 1])
def test_stale_updates_are_bounded_as_any_other_and_cost_nobody_else(
    offsite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: int
) -> None:
    config = offsite(**OFFSITE)
    honest = rounds_of(config, tmp_path / "honest")
    replies_of(monkeypatch, VICTIM, replayed(late))
    rows = rounds_of(config, tmp_path / "stale")
    for row, good in zip(rows, honest, strict=True):
        parts = row["lineage"]["contributions"]
        assert set(row["lineage"]["charged"]) <= {LIAR}
        assert not row["train"]["lost"]
        assert row["plug_in_loss"] == pytest.approx(good["plug_in_loss"], rel=0.05)
        if LIAR in parts:
            kept = parts[LIAR]["share"] * parts[LIAR]["norm"]
            assert kept <= 2.01 * np.median([part["norm"] for part in parts.values()])


def nan_in_the_last_tensor(reply: Message) -> None:
    record = reply.content.array_records[WEIGHTS]
    name = list(record)[-1]
    value = record[name].numpy().copy()
    value.flat[-1] = np.nan
    record[name] = Array(value)


def test_a_single_nan_costs_its_owner_the_round_and_nobody_else(
    offsite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replies_of(monkeypatch, VICTIM, nan_in_the_last_tensor)
    (row,) = rounds_of(offsite(**OFFSITE | {"train__rounds": 1}), tmp_path)
    assert list(row["train"]["lost"]) == [LIAR]
    assert "must be finite" in row["train"]["lost"][LIAR]
    assert sorted(row["lineage"]["contributions"]) == ["owner-0", "owner-2", "owner-3", "owner-4"]


@pytest.mark.parametrize("count", [0.0, -1.0, 5e-324, 1e-30, 0.5])
@pytest.mark.parametrize("key", ["targets", "num-examples"])
def test_counts_of_nothing_are_refused(key: str, count: float) -> None:
    """Of two owners the lower count is the median that the other one's is cut to."""
    schema = REPLIES["offsite-tuning/train"]
    good = dict.fromkeys(schema.required, 8.0)
    schema.check(good)
    with pytest.raises(WireError, match=f"reply's {key}=.*: must be >= 1"):
        schema.check({**good, key: count})
