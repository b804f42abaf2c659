"""The table of emulators: every method's row, finished cells kept."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedsplit.errors import ConfigError
from simulations.offsite_experiment import METHODS, run
from simulations.run_folder import RunFolder, read_results
from simulations.settings import Experiment

COLUMNS = {
    *("method", "seed", "full_zero_shot", "full_ft", "emulator_zero_shot", "emulator_ft"),
    *("plug_in", "adapters_in_full", "emulator_params", "build_s", "trained_params"),
}


def experiment(tiny_llama: Path, texts: Path, **options: Any) -> Experiment:
    flat = {
        "strategy": "offsite-tuning",
        "model.name": str(tiny_llama),
        "model.task": "causal-lm",
        "data.kind": "file",
        "data.path": str(texts),
        "data.owners": 2,
        "data.partition": "iid",
        "offsite.block": 8,
    }
    small = {
        "seeds": 1,
        "steps": 2,
        "batch": 4,
        "held-out": 8,
        "adapters": 1,
        "importance-steps": 10,
        "distil-steps": 2,
    }
    return Experiment("o", "offsite-table", "", flat, {**small, **options})


def test_every_method_has_its_row_and_none_is_made_twice(
    tiny_llama: Path, texts: Path, tmp_path: Path
) -> None:
    console = Console(file=io.StringIO())
    asked = experiment(tiny_llama, texts)
    with RunFolder(tmp_path, name="o", kind="table") as folder:
        run(asked, folder, console)
    rows = read_results(tmp_path)["rows"]
    assert [r["method"] for r in rows] == list(METHODS)
    for row in rows:
        assert row.keys() >= COLUMNS
        assert all(math.isfinite(row[c]) for c in COLUMNS - {"method"})
        # The base is as it was after every trial.
        assert row["zero_shot_check"] == pytest.approx(row["full_zero_shot"], rel=1e-6)
    with RunFolder(tmp_path, name="o", kind="table", force=True) as folder:
        run(asked, folder, console)
    assert read_results(tmp_path)["rows"] == rows


def test_unknown_methods_and_options_are_named(
    tiny_llama: Path, texts: Path, tmp_path: Path
) -> None:
    console = Console(file=io.StringIO())
    for options, told in (({"methods": ["zip"]}, "zip"), ({"stepz": 1}, "stepz")):
        with (
            pytest.raises(ConfigError, match=told),
            RunFolder(tmp_path / told, name="o", kind="table") as folder,
        ):
            run(experiment(tiny_llama, texts, **options), folder, console)
