"""A sweep on two Ray nodes of which one is killed: every cell's row, as one process has them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from rich.console import Console

from simulations.core.run_folder import RunFolder, read_results
from simulations.core.settings import load_experiment
from simulations.sweep import run as sweep
from simulations.sweep.cell import run_cell
from simulations.sweep.plan import Cell
from tests.e2e.two_nodes import TwoNodes
from tests.tiny_models import save_texts, save_tiny_bert

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).resolve().parents[2]
CELLS = 3
SAME = ("accuracy", "loss", "empirical_privacy", "empirical_privacy_map", "strongest_attack")


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    run = {
        "model.name": str(save_tiny_bert(tmp_path / "bert")),
        "model.labels": 3,
        "model.max-tokens": 16,
        "train.rounds": 2,
        "train.batch-size": 4,
        "train.max-steps": 40,
        "train.epochs": 40,
        "data.kind": "file",
        "data.path": str(save_texts(tmp_path / "texts.jsonl", 96)),
        "data.owners": 2,
        "data.partition": "iid",
        "privacy.mechanism": "dchi",
        "privacy.eta": 40.0,
        "session.codec": "fp32",
        "output.transcript": True,
    }
    cells = [{"variant": "noisy", "privacy.eta": [40.0, 10.0, 3.0]}]
    options = {"seeds": 1, "attack-samples": 40, "cells": cells, "workers": 2}
    path = tmp_path / "cells.toml"
    path.write_text(tomli_w.dumps({"kind": "sweep", "about": "", "run": run, "options": options}))
    return path


def one_after_another(
    cells: Sequence[Cell], work: Path, attack_samples: int, workers: int
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    for cell in cells:
        yield cell, run_cell(cell, work / cell.key, attack_samples)


def attempts(out: Path) -> dict[str, set[str]]:
    """Return the attempts at cells that are under way or were killed, by cell."""
    found: dict[str, set[str]] = {}
    for path in out.glob("work/*/attempt-*/server/server.json"):
        found.setdefault(path.parts[-4], set()).add(path.parts[-3])
    return found


@pytest.mark.timeout(1200)
def test_cells_of_a_killed_node_are_started_again_and_come_to_the_same(
    experiment: Path, cluster: TwoNodes, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "simulations", "sweep", str(experiment), "--out", str(out)]
    command += ["--ray-address", cluster.address]
    with (tmp_path / "log").open("w") as log:
        running = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    seen: dict[str, set[str]] = {}
    killed = False
    try:
        while running.poll() is None:
            now = attempts(out)
            for key, found in now.items():
                seen.setdefault(key, set()).update(found)
            if not killed and len(now) == 2:  # a cell on each node
                cluster.kill_one()
                killed = True
            time.sleep(0.02)
    finally:
        running.kill()

    assert running.returncode == 0, (tmp_path / "log").read_text()[-3000:]
    assert killed
    results = read_results(out)
    assert results["broken"] == 0
    assert sorted(map(len, seen.values())) == [1] * (CELLS - 1) + [2], "one cell was on that node"
    with RunFolder(tmp_path / "one", name="cells", kind="table") as folder:
        sweep.run(load_experiment(str(experiment)), folder, Console(quiet=True), one_after_another)
    alone = read_results(tmp_path / "one")["rows"]
    assert len(results["rows"]) == len(alone) == CELLS
    for row, other in zip(results["rows"], alone, strict=True):
        assert row["key"] == other["key"]
        assert row["empirical_privacy"] is not None
        for name in SAME:
            assert row[name] == pytest.approx(other[name])
    assert not list((out / "work").glob("*"))
    assert json.loads((out / "results.json").read_text())["status"] == "completed"
