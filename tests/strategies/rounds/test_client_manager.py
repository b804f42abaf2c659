"""Owners come and go: late ones take part, those that keep failing sit out, and it is all told."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.config import LineageConfig, RunConfig
from fedsplit.wire.frames import Kind
from strategies.rounds.client_manager import ClientManager
from strategies.rounds.lineage_watch import LineageWatch
from strategies.split_tuning.strategy import SplitTuning
from tests.owners.interfere import Outgoing, tamper_with
from tests.strategies.local_grid import LocalGrid

QUICK: dict[str, Any] = {
    "train__max_steps": 1,
    "output__evaluate_every": 0,
    "lineage__gate": "off",
    "session__reconnect_s": 1.0,
}


def manager(after: int, rounds: int, least: int = 1) -> ClientManager:
    flat = {"train.bench-after": after, "train.bench-rounds": rounds, "train.min-owners": least}
    config = RunConfig.from_flat(flat)
    made = ClientManager(config, LineageWatch(LineageConfig(gate="off"), None))
    made.names.update({1: "a", 2: "b", 3: "c"})
    return made


def grid(*nodes: int) -> Any:
    return SimpleNamespace(get_nodes=lambda: [SimpleNamespace(node_id=n) for n in nodes])


@given(
    st.lists(st.sets(st.sampled_from("abc")), min_size=1, max_size=30),
    st.integers(1, 4),
    st.integers(1, 5),
)
def test_who_is_asked(failing: list[Iterable[str]], after: int, rounds: int) -> None:
    """An owner sits out exactly the B rounds after R failures in a row, and no round otherwise."""
    kept = manager(after, rounds)
    in_a_row = dict.fromkeys("abc", 0)
    until = dict.fromkeys("abc", 0)
    for number, fail in enumerate(failing, start=1):
        expected = {name for name in "abc" if until[name] < number} or set("abc")
        asked = {kept.names[n] for n in kept.sample(grid(1, 2, 3), number)}
        assert asked == expected
        lost = {name: "gone" for name in fail if name in asked}
        kept.record_outcomes(number, asked - lost.keys(), lost)
        for name in asked:
            in_a_row[name] = in_a_row[name] + 1 if name in lost else 0
            if name in lost and in_a_row[name] >= after:
                until[name] = number + rounds
        restarted = manager(after, rounds)
        restarted.restore(kept.state(), [])  # a restart forgets nothing
        kept = restarted


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(1, 4))
def test_charges_are_remembered_for_as_many_rounds_as_bench(lies: list[bool], after: int) -> None:
    kept = manager(after, 1000)
    charges = blameless = 0
    for number, lie in enumerate(lies, start=1):
        kept.record_outcomes(number, [] if lie else ["a"], {}, {"a": "its norm"} if lie else {})
        charges, blameless = (charges + 1, 0) if lie else (charges, blameless + 1)
        if blameless >= after:
            charges = 0
        restarted = manager(after, 1000)
        restarted.restore(kept.state(), [])
        kept = restarted
        assert ("a" in kept.benched) == (charges >= after)
        if charges >= after:
            assert "last in" in kept.benched["a"].reason
            return


def test_too_few_without_the_benched_ones() -> None:
    kept = manager(1, 5, least=3)
    kept.record_outcomes(1, ["a", "b"], {"c": "gone"})
    assert set(kept.benched_in(2)) == {"c"}
    assert sorted(kept.sample(grid(1, 2, 3), 2)) == [1, 2, 3]


def test_a_node_that_never_told_its_name_is_benched_too() -> None:
    kept = manager(2, 5)
    for number in (1, 2):
        kept.record_outcomes(number, ["a"], {"node 9": "never connected"})
    assert kept.sample(grid(1, 9), 3) == [1]


def test_an_owner_that_always_fails_is_benched_with_its_reason(
    make_config: Any, run_locally: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poison(outgoing: Outgoing) -> None:
        if outgoing.kind is Kind.GRAD:
            outgoing.body = b"\xff" * len(outgoing.body)  # NaN

    tamper_with(monkeypatch, {1: poison})
    options = QUICK | {"train__bench_after": 2, "train__bench_rounds": 2, "train__rounds": 5}
    run = run_locally(make_config(**options))
    rows = [row["train"] for row in run.server["rounds"]]
    assert [row["asked"] for row in rows] == [3, 3, 2, 2, 3]
    assert [sorted(row["lost"]) for row in rows] == [["owner-1"]] * 2 + [[]] * 2 + [["owner-1"]]
    assert all(row["partial"] for row in rows)
    assert not any(rows[n]["benched"] for n in (0, 1, 4))
    for row in rows[2:4]:
        assert "failed in 2 rounds in a row" in row["benched"]["owner-1"]
        assert "must be finite" in row["benched"]["owner-1"]
    assert all(row["finished"] == ["owner-0", "owner-2"] for row in rows)


def test_a_late_owner_takes_part_from_the_next_round_on(make_config: Any, run_locally: Any) -> None:
    def prepare(grid: LocalGrid, strategy: SplitTuning) -> None:
        late = max(grid.nodes)
        index = grid.nodes.pop(late)
        close = strategy.aggregate_train

        def joins(number: int, replies: Any) -> Any:
            grid.nodes[late] = index
            return close(number, replies)

        strategy.aggregate_train = joins  # type: ignore[method-assign]

    run = run_locally(make_config(**QUICK | {"train__rounds": 2}), prepare=prepare)
    rows = [row["train"] for row in run.server["rounds"]]
    assert [len(row["finished"]) for row in rows] == [2, 3]
    assert not any(row["partial"] for row in rows)
