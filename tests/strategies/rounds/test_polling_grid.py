"""Replies are heard when they come, and nobody is waited for for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Error, Message, RecordDict

from fedsplit.config import RunConfig
from simulations.runtime.federated import read_server
from simulations.runtime.local_run import run_in_process
from strategies.rounds.polling_grid import PollingGrid
from strategies.rounds.replies import NO_REPLY
from strategies.split_tuning.strategy import SplitTuning
from tests.strategies.failing import (
    OTHERS,
    QUICK,
    VICTIM,
    assert_only_the_victim_is_lost,
    refuse_to_connect,
)
from tests.strategies.local_grid import HANDLERS, LocalGrid

FOREVER_S = 80_000.0


class Scripted(LocalGrid):
    """Answers each node after so many looks; never, where there is no number."""

    def __init__(self, looks: dict[int, int], unsent: Iterable[int] = ()) -> None:
        super().__init__(RunConfig(), 0)
        self.left, self.unsent = dict(looks), set(unsent)
        self.asked: dict[str, Message] = {}
        self.looked = 0

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids: list[Any] = []
        for number, message in enumerate(messages):
            node = message.metadata.dst_node_id
            ids.append(None if node in self.unsent else f"m{number}")
            message.metadata.__dict__["_message_id"] = ids[-1] or ""
            if ids[-1]:
                self.asked[ids[-1]] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self.looked += 1
        ready = []
        for wanted in list(message_ids):
            assert wanted in self.asked, "asked for again, or never sent"
            node = self.asked[wanted].metadata.dst_node_id
            self.left[node] = self.left.get(node, 1 << 30) - 1
            if self.left[node] <= 0:
                asked = self.asked.pop(wanted)
                ready.append(Message(Error(code=2, reason=str(node)), reply_to=asked))
        return ready


def offers(*nodes: int) -> list[Message]:
    return [Message(RecordDict(), dst_node_id=n, message_type="train") for n in nodes]


def test_every_reply_comes_once_and_is_heard_when_it_comes() -> None:
    inner = Scripted({1: 3, 2: 1, 3: 2})
    heard: list[tuple[str, int]] = []
    grid = PollingGrid(
        inner, on_reply=lambda asked, m: heard.append((m.error.reason, inner.looked))
    )
    replies = list(grid.send_and_receive(offers(1, 2, 3), timeout=FOREVER_S))
    assert heard == [("2", 1), ("3", 2), ("1", 3)]
    assert [m.error.reason for m in replies] == ["2", "3", "1"]


def test_what_could_not_be_sent_is_not_waited_for() -> None:
    grid = PollingGrid(Scripted({1: 1, 3: 2}, unsent=[2]))
    replies = grid.send_and_receive(offers(1, 2, 3), timeout=FOREVER_S)
    assert [m.error.reason for m in replies] == ["1", "3"]


def test_a_timeout_ends_the_wait_and_keeps_what_came() -> None:
    grid = PollingGrid(Scripted({1: 1}))
    assert len(list(grid.send_and_receive(offers(1, 2), timeout=0.2))) == 1


def test_patience_begins_when_the_session_is_over() -> None:
    busy = iter([True] * 4 + [False] * 1000)
    inner = Scripted({1: 1})
    grid = PollingGrid(inner, is_needed=lambda nodes: nodes == {2} and next(busy), patience_s=0.01)
    assert len(list(grid.send_and_receive(offers(1, 2), timeout=FOREVER_S))) == 1
    assert inner.looked > 4


def test_a_failed_app_is_not_waited_for(
    make_config: Any, run_locally: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wave would stand for a day if the error were read at the round's end."""
    refuse_to_connect(monkeypatch, "session-ca='x': must be a readable PEM file")
    run = run_locally(make_config(**QUICK | {"session__wave_wait_s": FOREVER_S}))
    assert_only_the_victim_is_lost(run, "session-ca='x'", name="node 1034")


def test_an_app_that_hangs_after_its_session_is_lost(
    make_config: Any, run_locally: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, hanging = HANDLERS["train"], threading.Event()

    def hang(message: Message, context: Any) -> Message:
        reply = session(message, context)
        if context.node_config["partition-id"] == VICTIM:
            hanging.wait(60)
        return reply

    def prepare(grid: LocalGrid, strategy: SplitTuning) -> None:
        strategy.patience_s = 3.0

    monkeypatch.setitem(HANDLERS, "train", hang)
    try:
        run = run_locally(make_config(**QUICK), prepare=prepare)
    finally:
        hanging.set()
    train = run.server["rounds"][0]["train"]
    assert train["lost"] == {"owner-1": NO_REPLY}
    assert sorted(train["metrics"]["owners"]) == OTHERS
    assert train["steps"] == 2  # what it did before it hung counts


class Clock:
    """The clock, and a way to let it leap."""

    ahead = 0.0
    sleep = staticmethod(time.sleep)

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead


def test_an_offsite_owner_that_hangs_costs_itself_and_not_the_round(
    offsite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = offsite(data__owners=3, train__rounds=1, output__evaluate_every=0)
    clock, pull, work = Clock(), LocalGrid.pull_messages, LocalGrid._work
    trained: list[Message] = []

    def leap(self: LocalGrid, ids: Iterable[str]) -> Iterable[Message]:
        replies = list(pull(self, ids))
        trained.extend(m for m in replies if m.metadata.message_type == "train")
        if len(trained) == 2:
            clock.ahead = config.session.round_s
        return replies

    def hang(self: LocalGrid, message: Message, replies: list[Message]) -> None:
        victim = self.nodes[message.metadata.dst_node_id] == VICTIM
        if not (victim and message.metadata.message_type == "train"):
            work(self, message, replies)

    monkeypatch.setattr("strategies.rounds.polling_grid.time", clock)
    monkeypatch.setattr(LocalGrid, "pull_messages", leap)
    monkeypatch.setattr(LocalGrid, "_work", hang)
    run_in_process(config, tmp_path / "run")
    (row,) = read_server(tmp_path / "run" / "server")["rounds"]
    assert row["train"]["lost"] == {"node 1034": NO_REPLY}  # it has never told its name
    assert row["train"]["finished"] == OTHERS
    assert row["train"]["partial"]
