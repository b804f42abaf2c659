"""The extraction experiment: a row for each part of the budget, kept when it is killed."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from fedsplit.cli import app_cli
from fedsplit.emulators import Material, adapter_state, make_compressor
from fedsplit.emulators.files import save_emulator
from fedsplit.errors import ConfigError, ModelError
from fedsplit.models import load
from simulations.core.run_folder import RunFolder, read_results
from simulations.core.settings import Experiment, load_experiment
from simulations.offsite.extraction import ATTACKERS, checked_options, of_control, run
from tests.tiny_models import WORDS, save_tiny_llama


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A public text of some thousand tokens."""
    path = tmp_path_factory.mktemp("public") / "public.txt"
    lines = (" ".join(WORDS[(i * 7 + j * j) % 90] for j in range(40)) for i in range(60))
    path.write_text("\n".join(lines))
    return path


def experiment(tiny_llama: Path, texts: Path, public: Path, **options: Any) -> Experiment:
    flat = {
        "strategy": "offsite-tuning",
        "model.name": str(tiny_llama),
        "model.task": "causal-lm",
        "data.kind": "file",
        "data.path": str(texts),
        "data.owners": 2,
        "data.partition": "iid",
        "offsite.block": 8,
        "offsite.public": str(public),
    }
    small = {
        "methods": ["scaleot-src"],
        "settle-steps": 2,
        "steps": 2,
        "batch": 4,
        "held-out": 8,
        "adapters": 1,
        "importance-steps": 10,
        "budget": [0, 1, 3],
        "windows": 20,
        "attack-batch": 4,
    }
    return Experiment("x", "offsite-extraction", "", flat, {**small, **options})


def test_rows_follow_the_budget_and_finished_cells_are_kept(
    tiny_llama: Path, texts: Path, public: Path, tmp_path: Path
) -> None:
    asked = experiment(tiny_llama, texts, public)
    for _ in range(2):
        with RunFolder(tmp_path, name="x", kind="table", force=True) as folder:
            run(asked, folder, Console(file=io.StringIO()))
    results = read_results(tmp_path)
    rows = results["rows"]

    assert len(rows) == 4 * 3
    kept = (tmp_path / "cells.jsonl").read_text().splitlines()
    assert sum("attack" in json.loads(json.loads(line)["key"]) for line in kept) == 4
    assert (tmp_path / results["plots"][0]).stat().st_size > 1000
    for row in rows:
        assert row["tokens"] == row["steps"] * 4 * 8
        assert row["queried_tokens"] == (row["tokens"] if "queries" in row["attack"] else 0)
        # Nothing has happened yet: nothing is closed.
        # The control begins at the full model.
        begin = "full" if row["attack"] == "control" else "emulator"
        if row["steps"] == 0:
            for gap in ("public", "task"):
                assert row[f"{gap}_attacked"] == pytest.approx(row[f"{gap}_{begin}"], abs=1e-4)
    # The same emulators and the same full model in front of every attacker.
    assert len({(r["public_full"], r["public_emulator"], r["task_full"]) for r in rows}) == 1


def test_gains_are_compared_with_the_full_models_own() -> None:
    def row(attack: str, steps: int, attacked: float) -> dict[str, Any]:
        about = {"method": "ot", "seed": 0, "attack": attack, "steps": steps}
        return {**about, "public_full": 4.0, "public_emulator": 5.0, "public_attacked": attacked}

    rows = [row("control", 10, 3.0), row("control", 5, 3.5), row("lm", 10, 4.0)]

    assert of_control([rows[2]], rows) == "50 %"
    assert of_control([rows[2]], rows[1:]) == ""
    assert of_control([rows[0]], rows) == ""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"budget": []}, "budget"),
        ({"budget": [0]}, "budget"),
        ({"budget": [-1, 5]}, "budget"),
        ({"attacks": ["steal"]}, "attack='steal'"),
        ({"methods": ["x"]}, "method='x'"),
        ({"windows": 1}, "windows=1"),
        ({"bugdet": [1]}, "options.bugdet"),
    ],
)
def test_options_are_checked_before_anything_runs(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        checked_options(options)


def test_the_named_experiment_is_well_formed() -> None:
    named = load_experiment("offsite-extraction")

    assert set(checked_options(named.options)["attacks"]) <= set(ATTACKERS)
    assert named.result_kind == "table"


def test_the_command_measures_an_emulators_folder(
    tiny_llama: Path, public: Path, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    loaded = load(tiny_llama, "causal-lm")
    emulator = make_compressor("layerdrop", adapters=(0,), keep=1).build(loaded.model, Material())
    save_emulator(emulator, tmp_path / "emulator", tokenizer=loaded.tokenizer)
    save_file(adapter_state(emulator), tmp_path / "adapters.safetensors")
    other = save_tiny_llama(tmp_path / "other", seed=5)
    arguments = [
        *("attack", "extraction", str(tmp_path / "emulator"), "--public", str(public)),
        *("--steps", "4", "--looks", "2", "--block", "8", "--windows", "30"),
        *("--adapters", str(tmp_path / "adapters.safetensors"), "--task", str(public)),
        *("--json", str(tmp_path / "out.json"), "--queries"),
    ]

    done = CliRunner().invoke(app_cli, [*arguments, "--base", str(tiny_llama)])

    assert done.exit_code == 0, done.output
    content = json.loads((tmp_path / "out.json").read_text())
    assert [row["steps"] for row in content["rows"]] == [0, 2, 4]
    assert "logits" in content["knowledge"]
    foreign = CliRunner().invoke(app_cli, [*arguments, "--base", str(other)])
    assert isinstance(foreign.exception, ModelError)
