"""The table of emulators: every method's row, finished cells kept."""

from __future__ import annotations

import importlib.util
import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fedsplit.emulators.importance.run import LayerReplace
from fedsplit.errors import ConfigError
from fedsplit.models.loading import load
from simulations.bench.emulator import run as run_bench
from simulations.core.run_folder import RunFolder, read_results
from simulations.core.settings import Experiment
from simulations.offsite.emulator_sweep import PLOT as SWEEP_PLOT
from simulations.offsite.emulator_sweep import run as run_sweep
from simulations.offsite.emulator_table import METHODS, run
from simulations.offsite.extraction import run as run_extraction
from simulations.offsite.plots import sweep_plot

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
        "settle-steps": 2,
        "distil-steps": 2,
        "public-blocks": 64,
    }
    return Experiment("o", "offsite-table", "", flat, {**small, **options})


def test_every_method_has_its_row_and_none_is_made_twice(
    tiny_llama: Path, texts: Path, tmp_path: Path
) -> None:
    console = Console(file=io.StringIO())
    asked = experiment(tiny_llama, texts, methods=list(METHODS))
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
    # One importance run a seed, kept with the run, and its scores told.
    assert len(list(tmp_path.glob("importance-0-*/importance.json"))) == 1
    assert (
        len(read_results(tmp_path)["importance"]["0"])
        == json.loads((tiny_llama / "config.json").read_text())["num_hidden_layers"]
    )
    by = {r["method"]: r for r in rows}
    assert by["scaleot-src"]["adapters"] == by["scaleot"]["adapters"]
    assert by["ot-large"]["emulator_params"] >= by["ot"]["emulator_params"]


def test_a_table_over_prompts_and_answers_counts_the_answers_alone(
    tiny_llama: Path, tmp_path: Path
) -> None:
    asked = [{"prompt": f"w{i} w{i + 1}", "completion": f"w{i + 2} w{i + 3}"} for i in range(20)]
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in asked))
    made = experiment(tiny_llama, path, methods=["ot", "scaleot"], full=False)
    made.run.update({"data.kind": "instructions", "offsite.block": 12})
    with RunFolder(tmp_path / "run", name="o", kind="table") as folder:
        run(made, folder, Console(file=io.StringIO()))
    rows = read_results(tmp_path / "run")["rows"]
    assert [(r["data"], r["method"]) for r in rows] == [("asked", "ot"), ("asked", "scaleot")]
    # Two words and the end of each of the owners' four answers held out, and no prompt.
    assert {r["held_out_tokens"] for r in rows} == {4 * 3}
    assert all(math.isfinite(r["plug_in"]) for r in rows)
    options = {**made.options, "methods": ["ot"], "attacks": ["lm"], "budget": [1]}
    attacked = replace(made, options=options)
    with (
        pytest.raises(ConfigError, match=r"data\.kind='instructions': must be plain text"),
        RunFolder(tmp_path / "attacked", name="o", kind="table") as folder,
    ):
        run_extraction(attacked, folder, Console(file=io.StringIO()))


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


def test_a_sweep_has_a_row_for_each_point_and_its_picture(
    tiny_llama: Path, texts: Path, tmp_path: Path
) -> None:
    asked = experiment(
        tiny_llama, texts, alphas=[0.0, 1.0], betas=[1.0], targets=["mhsa", "ffn"], steps=1
    )
    options = {k: v for k, v in asked.options.items() if k != "distil-steps"}
    asked = Experiment("s", "offsite-sweep", "", asked.run, options)
    with RunFolder(tmp_path, name="s", kind="table") as folder:
        run_sweep(asked, folder, Console(file=io.StringIO()))
    rows = read_results(tmp_path)["rows"]
    points = [(r["knob"], r["target"], r["value"]) for r in rows]
    assert points == [
        ("alpha", "", 0.0),
        ("alpha", "", 1.0),
        ("beta", "mhsa", 1.0),
        ("beta", "ffn", 1.0),
    ]
    whole, small = rows[0], rows[1]
    # alpha = 0 is the base itself: what is tuned in it is what plugs in.
    assert whole["emulator_zero_shot"] == pytest.approx(whole["full_zero_shot"], rel=1e-5)
    assert whole["plug_in"] == pytest.approx(whole["emulator_ft"], rel=1e-5)
    assert small["emulator_params"] < whole["emulator_params"]
    assert all(r["emulator_params"] <= whole["emulator_params"] for r in rows[2:])
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / SWEEP_PLOT).stat().st_size > 1000


def test_a_bad_sweep_names_its_value(tiny_llama: Path, texts: Path, tmp_path: Path) -> None:
    asked = experiment(tiny_llama, texts)
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"alphas": [1.5]}, "1.5"),
        ({"targets": ["head"]}, "head"),
        ({"x": 1}, "options.x"),
    )
    for number, (change, told) in enumerate(cases):
        bad = Experiment("s", "offsite-sweep", "", asked.run, change)
        with (
            pytest.raises(ConfigError, match=told),
            RunFolder(tmp_path / str(number), name="s", kind="table") as folder,
        ):
            run_sweep(bad, folder, Console(file=io.StringIO()))


def test_a_run_in_another_setting_does_not_reuse_harmonizers(
    tiny_llama: Path, texts: Path, tmp_path: Path
) -> None:
    for steps in (10, 11):
        asked = experiment(tiny_llama, texts, methods=["scaleot"], **{"importance-steps": steps})
        with RunFolder(tmp_path, name="o", kind="table", force=True) as folder:
            run(asked, folder, Console(file=io.StringIO()))
    assert len(list(tmp_path.glob("importance-0-*"))) == 2


class MadeAgain(Exception):
    """What should have been found was to be made a second time."""


def made_again(what: str) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise MadeAgain(what)

    return fail


def carried_out(asked: Experiment, folder: Path) -> list[dict[str, Any]]:
    with RunFolder(folder, name="o", kind="table") as run_folder:
        run(asked, run_folder, Console(file=io.StringIO()))
    rows: list[dict[str, Any]] = read_results(folder)["rows"]
    return rows


def test_a_folder_of_prepared_runs_serves_experiments_with_other_options(
    tiny_llama: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "prepared"
    chosen: dict[str, Any] = {"methods": ["scaleot-src", "scaleot-src-outputs"]}
    asked = experiment(tiny_llama, texts, prepared=str(shared), beta=0.5, **chosen)
    by_weights, by_outputs = carried_out(asked, tmp_path / "0")
    assert by_weights["emulator_params"] == by_outputs["emulator_params"]
    assert by_weights["emulator_zero_shot"] != by_outputs["emulator_zero_shot"]
    monkeypatch.setattr(LayerReplace, "run", made_again("importance"))
    for name in ("tuned_in_full", "fully_tuned"):
        monkeypatch.setattr(f"simulations.offsite.setting.{name}", made_again("bound"))
    asked = replace(asked, options={**asked.options, "beta": 0.75, "methods": ["scaleot-src"]})
    (row,) = carried_out(asked, tmp_path / "1")
    # One importance run and one set of settled harmonizers, with the seconds that they took.
    kept = [p for p in shared.iterdir() if p.is_dir()]
    assert sorted(p.name.split("-")[0] for p in kept) == ["importance", "settled"]
    for folder in kept:
        assert 0 < float((folder / "seconds").read_text()) < row["build_s"]

    # Other private text has other bounds, and the same importance run.
    (tmp_path / "other.txt").write_text(texts.read_text()[::-1])
    other = replace(asked, run={**asked.run, "data.path": str(tmp_path / "other.txt")})
    with pytest.raises(MadeAgain, match="bound"):
        carried_out(other, tmp_path / "2")
    # Another head, the same trunk: nothing is found.
    model = load(tiny_llama, "causal-lm")
    with torch.no_grad():
        model.model.get_output_embeddings().weight.mul_(2)
    model.model.save_pretrained(tmp_path / "scaled")
    model.tokenizer.save_pretrained(tmp_path / "scaled")
    scaled = replace(asked, run={**asked.run, "model.name": str(tmp_path / "scaled")})
    with pytest.raises(MadeAgain, match="importance"):
        carried_out(scaled, tmp_path / "3")
    assert not list(shared.glob(".*draft*"))


def test_what_a_killed_run_left_in_the_folder_is_not_believed(
    tiny_llama: Path, texts: Path, tmp_path: Path
) -> None:
    shared = tmp_path / "prepared"
    asked = experiment(tiny_llama, texts, prepared=str(shared), methods=["scaleot"])
    (first,) = carried_out(asked, tmp_path / "0")
    (importance,) = shared.glob("importance-*")
    (importance / "importance.json").write_text("{")
    (again,) = carried_out(asked, tmp_path / "1")
    assert again["plug_in"] == first["plug_in"]
    assert json.loads((importance / "importance.json").read_text())
    draft = importance.rename(importance.with_name(f".{importance.name}.draft"))
    (again,) = carried_out(asked, tmp_path / "2")
    assert again["plug_in"] == first["plug_in"]
    assert not draft.exists()
    assert importance.exists()


def test_prepared_must_be_a_folder_to_write_in(
    tiny_llama: Path, texts: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    asked = experiment(
        tiny_llama, texts, prepared=str(tmp_path / "file" / "x"), methods=["scaleot"]
    )
    with pytest.raises(ConfigError, match=r"options\.prepared='.*file/x'"):
        carried_out(asked, tmp_path / "0")


def test_the_bench_counts_seconds_of_both_ways(
    tiny_llama: Path, texts: Path, tmp_path: Path
) -> None:
    small: dict[str, Any] = {
        "steps": 2,
        "batch": 4,
        "held-out": 8,
        "adapters": 2,
        "importance-steps": 10,
    }
    small |= {"settle-steps": 2, "alpha": 0.5, "public-blocks": 64}
    overrides = [f"options.{k}={v}" for k, v in small.items()]
    overrides += [f"model={tiny_llama}", f"data.path={texts}", "offsite.public=", "data.owners=2"]
    figures = run_bench(
        Console(file=io.StringIO()),
        tmp_path / "b.json",
        [*overrides, "offsite.block=8"],
        steps=(1, 2),
        width=96,
        rank=8,
        repeats=1,
    )
    ours, rows = figures["scaleot"], figures["distillation"]
    assert ours["seconds"] >= ours["importance_s"] + ours["settle_s"] > 0
    assert figures["reached"] == (rows[-1]["plug_in"] <= ours["plug_in"])
    assert figures["ratio"] == rows[-1]["seconds"] / ours["seconds"]
    full, eigen, randomised = figures["svd"]
    assert eigen["error"] == pytest.approx(full["error"], rel=1e-6)
    assert full["error"] <= randomised["error"] < 1.05 * full["error"]
    assert json.loads((tmp_path / "b.json").read_text())["svd"] == figures["svd"]


@pytest.mark.parametrize("change", [{"steps": (2, 1)}, {"rank": 0}, {"repeats": 0}])
def test_bench_numbers_out_of_range(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        run_bench(Console(file=io.StringIO()), **change)


def test_a_sweep_of_one_seed_is_drawn_whatever_its_mean_rounds_to(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    # exp(log(x)) is not x: a bar from the mean to the lowest of one seed may be below zero.
    values = [1 + n / 7 for n in range(200)]
    rows = [
        {"knob": "alpha", "target": "", "value": v, "plug_in": v, "emulator_ft": v + 1}
        | {"emulator_zero_shot": 3 * v}
        for v in values
    ]
    sweep_plot(tmp_path / "sweep.png", rows)
    assert (tmp_path / "sweep.png").stat().st_size > 1000
