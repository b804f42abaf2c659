"""A task's scores, federated beside centralised: each seed's two cells are kept, and agree."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedsplit.errors import ConfigError, RunError
from simulations.core.run_folder import RunFolder
from simulations.core.settings import Experiment, load_experiment
from simulations.split import task_parity
from simulations.split.task_parity import run
from tests.tiny_models import save_tiny_bert

COLUMNS = {"seed", "metric", "federated", "centralised", "before", "texts", "steps"}


def pairs(folder: Path) -> Path:
    """Write pairs of sentences and their similarity as STS-B has them: CSV without a header."""
    folder.mkdir()
    for split, count in (("train", 80), ("test", 40)):
        with open(folder / f"{split}.csv", "w", newline="") as file:
            csv.writer(file).writerows(
                [f"w{i % 9} w{i % 7}", f"w{i % 5}, w3", (i % 11) / 2] for i in range(count)
            )
    return folder


def test_rows_of_every_seed_survive_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = load_experiment("pairs", [f"data.path={pairs(tmp_path / 'data')}"])
    settings: dict[str, Any] = {
        **shipped.run,
        "model.name": str(save_tiny_bert(tmp_path / "model")),
        "model.autocast": "off",
        "model.max-tokens": 32,
        "session.codec": "fp32",
        "train.optimizer": "sgd",
        "train.lr": 0.1,
        "data.owners": 2,
    }
    settings.pop("model.sha256")
    options = {**shipped.options, "seeds": 2}
    experiment = Experiment("pairs", "task-parity", "a test", settings, options)
    done: list[int] = []
    real = task_parity.centralised

    def once(config: Any) -> dict[str, float]:
        if done:
            raise RunError("killed")
        done.append(config.seed)
        return real(config)

    monkeypatch.setattr(task_parity, "centralised", once)
    with (
        pytest.raises(RunError, match="killed"),
        RunFolder(tmp_path / "out", name="pairs", kind="table") as folder,
    ):
        run(experiment, folder, Console(file=io.StringIO()))
    monkeypatch.setattr(task_parity, "centralised", real)
    shown = io.StringIO()
    with RunFolder(tmp_path / "out", name="pairs", kind="table") as folder:
        run(experiment, folder, Console(file=shown, width=200))
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [(r["seed"], r["metric"]) for r in rows] == [
        (seed, metric) for seed in (0, 1) for metric in ("spearman", "pearson")
    ]
    for row in rows:
        assert row.keys() >= COLUMNS
        assert row["federated"] == pytest.approx(row["centralised"], abs=1e-3)
        assert row["texts"] == 40
        assert row["steps"] == row["centralised_steps"]
    assert "spearman" in shown.getvalue()
    other = Experiment("pairs", "task-parity", "", settings, {**options, "metrics": ["f1"]})
    with (
        pytest.raises(RunError, match="must be scores of this task"),
        RunFolder(tmp_path / "out", name="pairs", kind="table", force=True) as folder,
    ):
        run(other, folder, Console(file=io.StringIO()))


def test_data_that_is_not_there_is_told_before_anything_runs(tmp_path: Path) -> None:
    experiment = load_experiment("pairs", [f"data.path={tmp_path / 'none'}"])
    with (
        pytest.raises(ConfigError, match=r"data\.path=.*none': must be there"),
        RunFolder(tmp_path / "out", name="pairs", kind="table") as folder,
    ):
        run(experiment, folder, Console(file=io.StringIO()))
