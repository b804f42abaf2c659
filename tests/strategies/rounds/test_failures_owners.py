"""Owners that go away, waves that stay small, tokens and names."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from fedsplit.client import split as client_split
from fedsplit.errors import (
    ConfigError,
    ModelError,
    RunError,
)
from fedsplit.owners.task import OwnerTask
from fedsplit.wire.frames import Kind
from strategies.split_tuning.session_round import SessionRound
from strategies.split_tuning.strategy import SplitTuning
from tests.owners.interfere import Outgoing, tamper_with
from tests.strategies.failing import (
    QUICK,
    VICTIM,
    assert_only_the_victim_is_lost,
    grid_node,
    hurry,
    nan_gradient,
    refuse_to_connect,
    warm,
)
from tests.strategies.local_grid import LocalGrid

__all__ = ["warm"]  # a fixture that runs by itself


@pytest.mark.parametrize("kind", [Kind.BATCH, Kind.GRAD, Kind.DONE])
def test_an_owner_that_disappears_in_a_step(
    make_config: Any, run_locally: Any, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    def vanish(outgoing: Outgoing) -> bool:
        if outgoing.at(kind, 1):
            outgoing.link._channel.close()  # type: ignore[attr-defined]
            return True
        return False

    tamper_with(monkeypatch, {VICTIM: vanish})
    began = time.monotonic()
    run = run_locally(make_config(**QUICK))
    assert_only_the_victim_is_lost(run, "SessionError")
    assert time.monotonic() - began < 20, "a lost stream should be noticed at once"


@pytest.mark.parametrize("kind", [Kind.READY, Kind.BATCH, Kind.GRAD])
def test_an_owner_that_stops_answering(
    make_config: Any, run_locally: Any, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    silent = False

    def silence(outgoing: Outgoing) -> bool:
        nonlocal silent
        silent = silent or outgoing.at(kind)
        return silent

    tamper_with(monkeypatch, {VICTIM: silence})

    def prepare(grid: LocalGrid, strategy: SplitTuning) -> None:
        honest = strategy._make_session

        def make_session(link: Any, hello: Any) -> Any:
            made = honest(link, hello)
            if hello.owner == "owner-1":  # the others may be slow on a busy machine
                made._deadline = 1.0
            return made

        strategy._make_session = make_session  # type: ignore[method-assign]

    run = run_locally(make_config(**QUICK), prepare=prepare)
    waited = 3 if kind is Kind.READY else 1  # before READY an owner may measure
    assert_only_the_victim_is_lost(run, f"DeadlineError: no frame within {waited} s")


def test_an_owner_that_raises_before_it_connects(
    make_config: Any, run_locally: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry(monkeypatch, {1: {2}})
    refuse_to_connect(monkeypatch, "session-ca='x': must be a readable PEM file")
    run = run_locally(make_config(**QUICK))
    # Nobody has heard its name yet: it is called by its node, and its own reason is kept.
    assert_only_the_victim_is_lost(run, "session-ca='x'", name="node 1034")


def test_an_owner_whose_process_is_gone(
    make_config: Any, run_locally: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry(monkeypatch, {1: {2}})

    def prepare(grid: LocalGrid, strategy: SplitTuning) -> None:
        grid.dead.add(VICTIM)
        strategy.patience_s = 0.2

    run = run_locally(make_config(**QUICK), prepare=prepare)
    assert_only_the_victim_is_lost(run, "never connected (0.2 s)", name="node 1034")


def test_a_lost_owner_is_back_in_the_next_round(
    make_config: Any, run_locally: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def once(outgoing: Outgoing) -> None:
        if outgoing.round == 1:
            nan_gradient(outgoing)

    tamper_with(monkeypatch, {VICTIM: once})
    run = run_locally(make_config(**QUICK | {"train__rounds": 2}))
    assert_only_the_victim_is_lost(run, "must be finite")
    second = run.server["rounds"][1]["train"]
    assert second["finished"] == ["owner-0", "owner-1", "owner-2"]
    assert second["lost"] == {}


@pytest.mark.parametrize("transport", ["stream", "messages"])
def test_all_owners_failing_is_an_end_with_reasons(
    make_config: Any,
    run_locally: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    transport: str,
) -> None:
    def broken(*args: Any) -> Any:
        raise ModelError("bottom: power cut")

    monkeypatch.setattr(client_split, "build_split_owner", broken)
    config = make_config(session__transport=transport, **QUICK)
    with pytest.raises(RunError, match=r"round 1: no owner took a step: owner-\d: .*power cut"):
        run_locally(config)
    row = json.loads((tmp_path / "server" / "server.json").read_text())["rounds"][0]["train"]
    assert sorted(row["lost"]) == ["owner-0", "owner-1", "owner-2"]
    assert row["finished"] == []


def test_no_owner_connecting_is_an_end_too(make_config: Any, run_locally: Any) -> None:
    def prepare(grid: LocalGrid, strategy: SplitTuning) -> None:
        grid.dead.update(range(3))
        strategy.patience_s = 0.2

    with pytest.raises(RunError, match=r"never connected \(0.5 s\)"):
        run_locally(make_config(**QUICK | {"session__wave_wait_s": 0.5}), prepare=prepare)


def test_a_wave_that_stays_smaller_than_expected(
    make_config: Any, run_locally: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry(monkeypatch, {1: {1, 3}})

    def prepare(grid: LocalGrid, strategy: SplitTuning) -> None:
        grid.dead.add(VICTIM)
        strategy.patience_s = 0.2
        strategy.clients.names = {grid_node(grid, i): f"owner-{i}" for i in range(4)}

    config = make_config(data__owners=4, session__wave=2, **QUICK)
    train = run_locally(config, prepare=prepare, slots=2).server["rounds"][0]["train"]
    assert train["waves"] == [["owner-0"], ["owner-2", "owner-3"]]
    assert train["finished"] == ["owner-0", "owner-2", "owner-3"]
    assert train["lost"] == {"owner-1": "never connected (0.2 s)"}
    assert train["steps"] == 4


def test_a_first_wave_that_never_comes_does_not_end_the_round(
    make_config: Any, run_locally: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next wave is asked only when the first one's message has come back, which can be late."""
    connect, ask = OwnerTask.connect, SessionRound.mark_asked
    rounds: list[SessionRound] = []

    def asked(self: SessionRound, nodes: Any) -> None:
        rounds.append(self)
        self.wait_s = 0.3 if len(rounds) == 1 else 60.0
        ask(self, nodes)

    def late(task: OwnerTask) -> Any:
        if task.identity.node_config["partition-id"] != 0:
            return connect(task)
        until = time.monotonic() + 60
        while not rounds[0].report.cohort.lost and time.monotonic() < until:
            time.sleep(0.05)
        raise ConfigError("home: must be writable")

    monkeypatch.setattr(SessionRound, "mark_asked", asked)
    monkeypatch.setattr(OwnerTask, "connect", late)
    run = run_locally(make_config(session__wave=1, **QUICK), slots=1)
    train = run.server["rounds"][0]["train"]
    assert train["finished"] == ["owner-1", "owner-2"]
    assert list(train["lost"]) == ["owner-0"]
    assert "home: must be writable" in train["lost"]["owner-0"]


def test_a_token_is_good_for_one_session_of_one_owner(
    make_config: Any, run_locally: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry(monkeypatch, {1: {2}, 2: {1}})
    seen: dict[str, Any] = {}
    used: dict[str, str] = {}
    there = threading.Event()

    def keep(outgoing: Outgoing) -> None:
        if outgoing.kind is Kind.HELLO and not there.is_set():
            seen.update(outgoing.header)
        elif outgoing.kind is Kind.READY:  # its token is used up: TLS is what keeps it till then
            there.set()

    def other_token(outgoing: Outgoing) -> None:
        if outgoing.kind is Kind.HELLO and there.wait(60):
            outgoing.header["token"] = seen["token"]

    def other_token_and_node(outgoing: Outgoing) -> None:
        if outgoing.kind is Kind.HELLO and there.wait(60):
            outgoing.header.update(seen)

    def nobodys_token(outgoing: Outgoing) -> None:
        if outgoing.kind is Kind.HELLO:
            outgoing.header["token"] = "0" * 32 + ".99999999999." + "0" * 64

    def replayed(outgoing: Outgoing) -> None:
        if outgoing.kind is Kind.HELLO:
            outgoing.header["token"] = used.setdefault("token", outgoing.header["token"])

    thieves = [other_token, other_token_and_node, nobodys_token]
    tamper_with(monkeypatch, {0: keep, 4: replayed} | dict(enumerate(thieves, 1)))
    options = QUICK | {"train__rounds": 2, "train__max_steps": 1, "data__owners": 5}
    run = run_locally(make_config(**options))
    first, second = [row["train"] for row in run.server["rounds"]]
    assert first["finished"] == ["owner-0", "owner-4"]
    assert second["finished"] == ["owner-0"]
    assert len(first["lost"]) == 3
    assert len(second["lost"]) == 4
    for why in [*first["lost"].values(), *second["lost"].values()]:
        assert "TokenError: session token" in why


def test_two_owners_of_one_name(make_config: Any, run_locally: Any) -> None:
    """The second would be taken for the first wherever something is kept by name."""

    def prepare(grid: LocalGrid, strategy: SplitTuning) -> None:
        grid.node_configs[VICTIM] = {"owner": "owner-0"}
        strategy.clients.names = {grid_node(grid, 0): "owner-0"}

    run = run_locally(make_config(**QUICK), prepare=prepare)
    assert_only_the_victim_is_lost(run, "another node has it already", name="node 1034")
