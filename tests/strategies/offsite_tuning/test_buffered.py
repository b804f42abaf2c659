"""Buffered rounds: as synchronous where nobody is late, the same for a seed, over restarts too."""

from __future__ import annotations

import json
import random
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedsplit.config import BufferConfig, RunConfig
from fedsplit.errors import ConfigError, RunError
from fedsplit.wire.messages import WEIGHTS, weights_record
from strategies.offsite_tuning.flights import BufferedGrid, Flights
from strategies.offsite_tuning.strategy import OffsiteTuning
from tests.strategies.local_grid import LocalGrid

FOUR = {"data__owners": 4, "train__rounds": 4}


class Late(LocalGrid):
    """A grid whose owners really answer in another order each time."""

    def _work(self, message: Message, replies: list[Message]) -> None:
        time.sleep(random.random() * 0.2)
        super()._work(message, replies)


class Killed(RunError):
    """Stands for the end of the process."""


def run(config: RunConfig, *, run_id: int = 7, dies_in: int = 0) -> tuple[Any, list[Any]]:
    """Run to the end, or until a round of training begins; return arrays and rows."""
    grid = Late(config, config.data.owners, run_id=run_id, first=1000 * run_id)
    with OffsiteTuning.open(config, run_id=run_id) as strategy:
        honest, first = strategy.configure_train, strategy.rounds_done

        def configure_train(number: int, *args: Any) -> Any:
            if first + number == dies_in:
                raise Killed(f"killed before round {dies_in}")
            return honest(number, *args)

        strategy.configure_train = configure_train  # type: ignore[method-assign]
        result = strategy.start(grid)
    rows = json.loads((Path(config.output.dir) / "server.json").read_text())["rounds"]
    return {n: a.numpy() for n, a in result.arrays.items()}, rows


def same(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[n], other[n]) for n in one)


def test_a_buffer_of_the_whole_cohort_is_the_synchronous_run(quick: Any, tmp_path: Path) -> None:
    plain, _ = run(quick(**FOUR, output__dir=str(tmp_path / "plain")))
    found, rows = run(quick(**FOUR, buffer__size=4))
    assert same(plain, found)
    assert all(set(row["buffer"]["staleness"].values()) == {0} for row in rows)
    assert all(row["buffer"]["at_work"] == [] for row in rows)


def test_a_buffered_run_is_a_function_of_its_seed_and_survives_a_crash(
    quick: Any, tmp_path: Path
) -> None:
    changes = {**FOUR, "buffer__size": 2, "buffer__spread": 1.0, "lineage__gate": "reject"}
    whole, rows = run(quick(**changes, output__dir=str(tmp_path / "whole")))
    assert all(len(row["buffer"]["staleness"]) == 2 for row in rows)
    assert max(max(row["buffer"]["staleness"].values()) for row in rows) >= 1
    assert all(len(row["buffer"]["at_work"]) == 2 for row in rows)
    assert all(row["lineage"]["verdict"] == "in_lineage" for row in rows)
    assert set(rows[0]["lineage"]["owners"]) == set(rows[0]["buffer"]["staleness"])
    config = quick(**changes)
    with pytest.raises(Killed):
        run(config, run_id=8, dies_in=3)
    again, resumed = run(config, run_id=9)
    assert same(again, whole)
    assert [r["buffer"] for r in resumed] == [r["buffer"] for r in rows]


def test_who_is_first_depends_on_the_seed_and_the_names_alone() -> None:
    def order(seed: int, nodes: range) -> list[list[str]]:
        flights = Flights(BufferConfig(size=2, spread=1.0), seed)
        flights._virtual = True
        found = []
        for number in range(1, 6):
            for node in nodes:
                name = f"owner-{node % 5}"
                if name not in flights.owners:
                    flights.launch(node, name, number, weights_record({}))
            landed = flights.land(0.0)  # no message was sent: nothing is waited for
            assert landed is not None
            found.append([flight.owner for flight in landed])
        return found

    assert order(1, range(5)) == order(1, range(100, 105))
    assert len({str(order(seed, range(5))) for seed in range(6)}) > 3


def test_a_late_change_is_scaled_and_put_on_the_present_weights() -> None:
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    flights = Flights(BufferConfig(size=1, staleness=0.5), 0)
    then, now = np.float32([1.0, 2.0]), np.float32([5.0, 5.0])
    flights.launch(3, "a", 2, weights_record({"w": then}))
    (flight,) = flights._flights
    for number, expected in ((2, [3.0, 0.0]), (5, [5.0 + 2.0 / 2, 5.0 - 2.0 / 2])):
        asked = Message(RecordDict(), dst_node_id=3, message_type="train")
        asked.metadata.__dict__["_message_id"] = "m"
        content = RecordDict({WEIGHTS: weights_record({"w": np.float32([3.0, 0.0])})})
        reply = Message(content, reply_to=asked)
        flights.freshen(flight, number, reply, weights_record({"w": now}))
        found = reply.content.array_records[WEIGHTS]["w"].numpy()
        np.testing.assert_allclose(found, expected)  # three rounds late: (1 + 3)^-0.5


def test_updates_that_are_too_old_are_not_used() -> None:
    flights = Flights(BufferConfig(size=2, most_stale=1), 0)
    for node, number in ((1, 1), (2, 3)):
        flights.launch(node, f"owner-{node}", number, weights_record({}))
    kept = flights.close(3, flights._flights)
    assert [flight.owner for flight in kept] == ["owner-2"]
    assert flights.dropped == ["owner-1"]
    assert flights.staleness == {"owner-2": 0}


def test_without_a_simulation_the_first_to_answer_end_the_round(
    quick: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FEDSPLIT_SIMULATION")

    over = threading.Event()  # the round without the first owner

    class Echo(LocalGrid):
        def _work(self, message: Message, replies: list[Message]) -> None:
            node = message.metadata.dst_node_id
            if self.nodes[node] == 0:
                over.wait(60)
            reply = Message(RecordDict(), reply_to=message)
            reply.metadata.__dict__["_src_node_id"] = node
            replies.append(reply)

    grid = Echo(quick(), 3)
    flights = Flights(BufferConfig(size=2), 0)
    buffered = BufferedGrid(grid, flights)
    messages = []
    for node, index in grid.nodes.items():
        flights.launch(node, f"owner-{index}", 1, weights_record({}))
        messages.append(Message(RecordDict(), dst_node_id=node, message_type="train"))
    flights.due = True
    replies = list(buffered.send_and_receive(messages, timeout=30))
    assert sorted(flight.owner for flight in buffered.landed) == ["owner-1", "owner-2"]
    assert len(replies) == 2
    assert flights.owners == {"owner-0"}
    over.set()
    flights.due = True
    buffered.send_and_receive([], timeout=30)
    assert [flight.owner for flight in buffered.landed] == ["owner-0"]


def test_whoever_never_answers_is_given_up(quick: Any) -> None:
    grid = LocalGrid(quick(), 2)
    grid.dead = {0, 1}
    flights = Flights(BufferConfig(size=1), 0)
    buffered = BufferedGrid(grid, flights)
    node = next(iter(grid.nodes))
    flights.launch(node, "owner-0", 1, weights_record({}))
    flights.due = True
    asked = [Message(RecordDict(), dst_node_id=node, message_type="train")]
    assert list(buffered.send_and_receive(asked, timeout=0.2)) == []
    assert [flight.owner for flight in buffered.landed] == ["owner-0"]


def test_what_a_buffer_cannot_go_with_is_refused(quick: Any, make_config: Any) -> None:
    free = {"robust__clip": 0.0, "robust__weight_cap": 0.0, "robust__screen": False}
    with pytest.raises(ConfigError, match=r"buffer\.size=2.*secure\.aggregation"):
        quick(buffer__size=2, secure__aggregation=True, **free)
    with pytest.raises(ConfigError, match=r"buffer\.size=2.*offsite tuning"):
        make_config(buffer__size=2)


def test_the_state_goes_through_a_file() -> None:
    flights = Flights(BufferConfig(size=1), 5)
    flights.launch(3, "a", 2, weights_record({"w.x": np.float32([1.0])}))
    tensors, facts = flights.state()
    again = Flights(BufferConfig(size=1), 5)
    again.restore({n: torch.clone(t) for n, t in tensors.items()}, json.loads(json.dumps(facts)))
    assert again.owners == {"a"}
    assert again.version(2)["w.x"].numpy().tolist() == [1.0]
    (flight,) = again.relaunch({9: "a"})
    assert (flight.node, flight.number) == (9, 2)
    assert again.relaunch({}) == []
