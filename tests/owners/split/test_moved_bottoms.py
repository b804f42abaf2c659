"""A joint bottom never meets the same noise twice, however a server numbers its rounds."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsplit.owners.naming import SIMULATION_VARIABLE
from fedsplit.owners.split.run_state import RunState


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunState:
    monkeypatch.setenv(SIMULATION_VARIABLE, "0")
    return RunState(tmp_path, tmp_path)


def test_every_session_has_a_name_of_its_own(state: RunState) -> None:
    names = set()
    for _ in range(4):
        state.name_session("train")
        names.add(state.session_name("train", 1))
    assert len(names) == 4  # the same run, round and mode each time


def test_a_later_message_finds_the_sessions_name(state: RunState, tmp_path: Path) -> None:
    state.name_session("train")
    state.name_session("evaluate")
    later = RunState(tmp_path, tmp_path)
    assert later.session_name("train", 1) == state.session_name("train", 1)
    assert later.session_name("evaluate", 1) != state.session_name("train", 1)


def test_simulations_repeat_themselves(state: RunState, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SIMULATION_VARIABLE, "1")
    state.name_session("train")
    first = state.session_name("train", 1)
    state.name_session("train")
    assert state.session_name("train", 1) == first != state.session_name("train", 2)
