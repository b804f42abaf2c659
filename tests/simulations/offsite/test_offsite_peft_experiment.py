"""Methods inside A: a row for each, full adapters' gain as the measure, finished cells kept."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedsplit.errors import ConfigError
from simulations.core.run_folder import RunFolder, read_results
from simulations.core.settings import Experiment, load_experiment
from simulations.offsite.adapter_methods import OPTIONS, compared, run

SMALL = {
    "seeds": 1,
    "steps": 2,
    "batch": 4,
    "held-out": 8,
    "adapters": 1,
    "emulator": "ot",
    "rank": 2,
    "width": 4,
    "prefix": 2,
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
    return Experiment("o", "offsite-peft", "", flat, {**SMALL, **options})


def test_every_method_has_its_row_and_none_is_made_twice(
    tiny_llama: Path, texts: Path, tmp_path: Path
) -> None:
    console = Console(file=io.StringIO())
    asked = experiment(tiny_llama, texts)
    with RunFolder(tmp_path, name="o", kind="table") as folder:
        run(asked, folder, console)
    rows = read_results(tmp_path)["rows"]
    assert [r["method"] for r in rows] == OPTIONS["methods"]
    assert len({r["full_zero_shot"] for r in rows}) == 1
    shares = {r["method"]: r["trained_share"] for r in rows}
    assert max(shares, key=lambda m: shares[m]) == "full"
    for row in rows:
        gain = math.log(row["full_zero_shot"] / row["plug_in"])
        assert row["gain_nats"] == pytest.approx(gain, abs=1e-9)
        assert row["relative_gain"] == pytest.approx(gain / rows[0]["gain_nats"])
    again = experiment(tiny_llama, texts, methods=["full", "lora"])
    with RunFolder(tmp_path, name="o", kind="table", force=True) as folder:
        run(again, folder, console)
    assert read_results(tmp_path)["rows"] == rows[:2]


def test_gains_are_compared_within_a_seed() -> None:
    rows = [
        {"method": "full", "seed": 0, "gain_nats": 2.0},
        {"method": "lora", "seed": 0, "gain_nats": 1.0},
        {"method": "lora", "seed": 1, "gain_nats": 1.0},
    ]
    assert [row.get("relative_gain") for row in compared(rows)] == [1.0, 0.5, None]


def test_unknown_names_are_told(tiny_llama: Path, texts: Path, tmp_path: Path) -> None:
    console = Console(file=io.StringIO())
    for options in ({"methods": ["zip"]}, {"emulator": "zip"}, {"zip": 1}):
        with (
            pytest.raises(ConfigError, match="zip"),
            RunFolder(tmp_path / next(iter(options)), name="o", kind="table") as folder,
        ):
            run(experiment(tiny_llama, texts, **options), folder, console)


def test_the_named_experiment_loads() -> None:
    assert load_experiment("offsite-peft").kind == "offsite-peft"
