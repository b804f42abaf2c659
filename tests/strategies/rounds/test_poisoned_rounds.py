"""Whole federations in which one owner lies: what it moves, whether it is named, and benched."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, Message

from fedsplit.config import RunConfig
from fedsplit.wire.messages import REPORT, WEIGHTS
from simulations.runtime.federated import read_server
from simulations.runtime.local_run import run_strategy
from tests.strategies.failing import VICTIM
from tests.strategies.local_grid import LocalGrid
from tests.strategies.rounds.test_failures_replies import replies_of

OWNERS = {"data__owners": 5, "train__rounds": 4, "train__bench_after": 2, "train__bench_rounds": 1}
JOINT = OWNERS | {"split__bottom": "joint", "split__k": 1, "train__max_steps": 1}
OFFSITE = OWNERS | {"offsite__positions": "2"}


def rounds_of(config: RunConfig, folder: Path) -> list[dict[str, Any]]:
    config = replace(config, output=replace(config.output, dir=str(folder)))
    run_strategy(config, LocalGrid(config, config.data.owners))
    rows: list[dict[str, Any]] = read_server(folder)["rounds"]
    return rows


def scaled(reply: Message) -> None:
    record = reply.content.array_records[WEIGHTS]
    for name, array in list(record.items()):
        record[name] = Array((-1e5 * array.numpy()).astype(np.float32))


def greedy(reply: Message) -> None:
    reply.content[REPORT]["targets"] = 1e29


@pytest.mark.parametrize("strategy", ["offsite", "joint"])
def test_a_scaled_change_costs_nobody_else_and_its_owner_is_benched(
    make_config: Any,
    offsite: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    strategy: str,
) -> None:
    config = offsite(**OFFSITE) if strategy == "offsite" else make_config(**JOINT)
    honest = rounds_of(config, tmp_path / "honest")
    replies_of(monkeypatch, VICTIM, scaled)
    rows = rounds_of(config, tmp_path / "poisoned")
    for row in rows[:2]:
        assert list(row["lineage"]["charged"]) == ["owner-1"]
        assert row["lineage"]["contributions"]["owner-1"]["share"] < 1e-3
    assert "norm of its change" in rows[2]["train"]["benched"]["owner-1"]
    assert "owner-1" not in rows[2]["train"]["metrics"]["owners"]
    assert "owner-1" in rows[3]["train"]["metrics"]["owners"], "it is asked again afterwards"
    for row, good in zip(rows, honest, strict=True):
        if strategy == "offsite":
            assert abs(row["plug_in_loss"] - good["plug_in_loss"]) < 0.05 * good["plug_in_loss"]
        ours, theirs = row["train"]["metrics"]["loss"], good["train"]["metrics"]["loss"]
        assert math.isfinite(ours)
        assert abs(ours - theirs) < 0.1 * theirs
        assert not good["lineage"]["charged"]


def test_a_count_that_the_settings_cannot_give_is_refused(
    offsite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replies_of(monkeypatch, VICTIM, greedy)
    row = rounds_of(offsite(**OFFSITE | {"train__rounds": 1}), tmp_path)[0]
    assert list(row["train"]["lost"]) == ["owner-1"]
    # one step of two blocks of eight tokens
    assert "targets=1e+29: must be <= 14, with its steps=1" in row["train"]["lost"]["owner-1"]


def test_steps_and_blocks_must_fit_each_other(
    offsite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def many_steps(reply: Message) -> None:
        reply.content[REPORT]["steps"] = 1e9
        reply.content[REPORT]["targets"] = 1e10

    replies_of(monkeypatch, VICTIM, many_steps)
    row = rounds_of(offsite(**OFFSITE | {"train__rounds": 1}), tmp_path)[0]
    assert "steps=1e+09: must be <= 1" in row["train"]["lost"]["owner-1"]
