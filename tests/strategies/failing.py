"""What the tests of failures share: three owners, one of them the victim."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsplit.errors import ConfigError
from fedsplit.owners.task import OwnerTask
from fedsplit.wire.frames import Kind
from strategies.split_tuning.session_round import SessionRound
from tests.owners.interfere import Outgoing
from tests.strategies.local_grid import LocalGrid
from tests.strategies.run_local import LocalRun

VICTIM = 1
OTHERS = ["owner-0", "owner-2"]
QUICK: dict[str, Any] = {
    "train__max_steps": 2,
    "train__rounds": 1,
    "output__evaluate_every": 0,
    "lineage__gate": "off",
    "session__wave_wait_s": 60.0,
    "session__deadline_s": 60.0,
    "session__reconnect_s": 1.0,
}


def hurry(monkeypatch: pytest.MonkeyPatch, after: dict[int, set[int]]) -> None:
    """Stop waiting for those that never come once the others are there, however slow they were.

    Args:
        monkeypatch: undoes it.
        after: round -> counts of connected owners from which on nobody is waited for, until the
            next wave is asked.
    """
    greet, ask = SessionRound.handshake, SessionRound.mark_asked
    greeted: dict[SessionRound, int] = {}

    def asked(self: SessionRound, nodes: Any) -> None:
        ask(self, nodes)
        self.wait_s = 60.0

    def one_more(self: SessionRound, *args: Any, **options: Any) -> None:
        greet(self, *args, **options)
        with self._change:
            greeted[self] = greeted.get(self, 0) + 1
            if greeted[self] in after.get(self.context.number, ()):
                self.wait_s = 0.2
                self._change.notify_all()

    monkeypatch.setattr(SessionRound, "mark_asked", asked)
    monkeypatch.setattr(SessionRound, "handshake", one_more)


@pytest.fixture(scope="module", autouse=True)
def warm(tiny_bert: Path) -> None:
    """Load what the first session of a process would have to wait for."""
    from fedsplit.models.loading import load
    from fedsplit.models.splitting.halves import split

    split(load(str(tiny_bert), "sequence-classification", num_labels=3).model, 0)


def assert_only_the_victim_is_lost(
    run: LocalRun, reason: str, *, name: str = "owner-1", row: int = 0, steps: int = 2
) -> None:
    train = run.server["rounds"][row]["train"]
    assert list(train["lost"]) == [name], train["lost"]
    assert reason in train["lost"][name]
    assert train["finished"] == OTHERS
    assert train["steps"] == steps
    assert sorted(train["metrics"]["owners"]) == OTHERS
    assert all(bool(torch.isfinite(value).all()) for value in run.state.values())


def grid_node(grid: LocalGrid, owner: int) -> int:
    return next(node for node, index in grid.nodes.items() if index == owner)


def floats(outgoing: Outgoing, value: float, at: int = 0) -> None:
    """Put ``value`` among the frame's fp32 numbers."""
    outgoing.body = outgoing.body[: 4 * at] + struct.pack("<f", value) + outgoing.body[4 * at + 4 :]


def nan_gradient(outgoing: Outgoing) -> None:
    if outgoing.at(Kind.GRAD, 1):
        floats(outgoing, float("nan"))


def refuse_to_connect(monkeypatch: pytest.MonkeyPatch, told: str) -> None:
    """Let the victim's app fail before it has opened its session."""
    connect = OwnerTask.connect

    def unwilling(task: OwnerTask) -> Any:
        if task.identity.node_config["partition-id"] == VICTIM:
            raise ConfigError(told)
        return connect(task)

    monkeypatch.setattr(OwnerTask, "connect", unwilling)
