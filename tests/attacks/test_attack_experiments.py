"""The experiments on attacks, on tiny models: rows, resuming, and the laws they should show."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fedsplit.config import RunConfig
from fedsplit.errors import ConfigError, DataError, RunError
from fedsplit.models import load, split
from fedsplit.settings import read_settings
from simulations.bench import inversion as bench_inversion
from simulations.core.cells import CellStore
from simulations.core.run_folder import RunFolder, read_results
from simulations.core.settings import Experiment, load_experiment
from simulations.split import attribute_inference as attributes_experiment
from simulations.split import inversion_by_depth as depth_experiment
from simulations.split.known_accuracy import KnownAccuracy
from simulations.sweep.plan import Cell
from tests.tiny_models import WORDS, save_texts, save_tiny_bert

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    """A model, texts, public text, and two sources with private attributes in their words."""
    folder = tmp_path_factory.mktemp("material")
    save_tiny_bert(folder)
    save_texts(folder / "texts.jsonl", 60)
    generator = random.Random(1)
    lines = [" ".join(generator.choices(WORDS, k=8)) for _ in range(300)]
    (folder / "public.txt").write_text("\n".join(lines))
    for name, attribute in (
        ("isear/isear", "sex_code"),
        ("womens_clothing/womens_clothing", "age"),
    ):
        path = folder / f"{name}.jsonl"
        path.parent.mkdir()
        with path.open("w") as file:
            for row in range(240):
                person = row // 3
                private = person % 2
                label = generator.randrange(2)
                words = (
                    WORDS[40 * private : 40 * private + 40] if generator.random() < 0.8 else WORDS
                )
                text = generator.choices(words, k=8) + [WORDS[80 + label]] * 3
                value = str(private + 1) if attribute == "sex_code" else 30 + 20 * private
                line = {"text": " ".join(text), "label": label, "recommended": label}
                file.write(json.dumps({**line, attribute: value, "subject": person}) + "\n")
    return folder


def experiment(name: str, material: Path, **options: Any):
    data = material / "texts.jsonl" if name == "sap-depth" else material
    overrides = {
        "model.name": material,
        "model.sha256": "",
        "model.labels": 3,
        "model.max-tokens": 16,
        "data.path": data,
        **{f"options.{key.replace('_', '-')}": value for key, value in options.items()},
    }
    return load_experiment(
        name,
        [f"{k}={json.dumps(v) if not isinstance(v, Path) else v}" for k, v in overrides.items()],
    )


DEPTH = {
    "seeds": 2,
    "depths": [0, 2],
    "samples": 12,
    "optimisation_samples": 4,
    "optimisation_steps": 60,
    "learned_steps": 20,
}


def test_depth_rows_and_resuming(material: Path, tmp_path: Path):
    options = {**DEPTH, "public": str(material / "public.txt")}
    loaded = experiment("sap-depth", material, **options)
    with RunFolder(tmp_path / "run", name="d", kind="table") as folder:
        depth_experiment.run(loaded, folder, QUIET)
    rows = read_results(tmp_path / "run")["rows"]

    assert len(rows) == 2 * 2 * 5
    assert {"k", "mechanism", "level", "attacker", "success", "accuracy"} <= rows[0].keys()
    assert {"seed", "low", "high", "empirical_privacy", "top10", "seconds"} <= rows[0].keys()
    assert {(r["level"], r["accuracy"]) for r in rows} == {(None, None)}
    by = {(r["k"], r["attacker"], r["seed"]): r["success"] for r in rows}
    assert by[0, "nearest", 0] == by[2, "optimisation", 1] == by[2, "text_search", 0] == 1.0
    assert min(by[k, name, 0] for k in (0, 2) for name in ("learned", "token_states")) > 0.9

    # A second run in the folder finds every cell done (their seconds are the first run's), and so
    # does one that asks for fewer.
    for again in (loaded, experiment("sap-depth", material, **{**options, "seeds": 1})):
        with RunFolder(tmp_path / "run", name="d", kind="table", force=True) as folder:
            depth_experiment.run(again, folder, QUIET)
        found = read_results(tmp_path / "run")["rows"]
        assert found == [r for r in rows if again is loaded or r["seed"] == 0]


NOISE = {"privacy.mechanism": "dchi", "privacy.row-clip": "auto", "privacy.noise-ratio": 0.5}


def carry_out(loaded: Experiment, path: Path) -> list[dict[str, Any]]:
    with RunFolder(path, name="d", kind="table", force=True) as folder:
        depth_experiment.run(loaded, folder, QUIET)
    return list(read_results(path)["rows"])


def sweep_of(path: Path, model: str, *rows: dict[str, Any]) -> str:
    """Write what a sweep leaves of accuracy; rows as its cells' columns have them."""
    config = read_settings({**NOISE, "model.name": model})
    usual = {**Cell("noise", config).columns(), "accuracy": 0.5}
    with RunFolder(path, name="a", kind="table") as folder:
        folder.write_config(config.to_flat())
        folder.record(rows=[{**usual, **row} for row in rows])
    return str(path)


def test_accuracy_is_joined_and_no_cell_is_made_again(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**DEPTH, "public": str(material / "public.txt"), "attacks": ["nearest"]}
    loaded = experiment("sap-depth", material, **options)
    loaded = dataclasses.replace(loaded, run={**loaded.run, **NOISE, "seed": 3})
    before = carry_out(loaded, tmp_path / "run")
    assert {r["accuracy"] for r in before} == {None}

    # A version before this one: an attacker was an attack, and nothing had a level.
    store = tmp_path / "run" / "cells.jsonl"
    cells = [json.loads(line) for line in store.read_text().splitlines()]
    for cell in cells:
        for row in cell["rows"]:
            row["attack"] = row.pop("attacker")
            del row["level"]
    store.write_text("".join(json.dumps(cell) + "\n" for cell in cells))

    def made_again(*_: Any, **about: Any) -> None:
        pytest.fail(f"made again: {about}")

    monkeypatch.setattr(depth_experiment.DepthSetting, "cell", made_again)
    place = sweep_of(
        tmp_path / "accuracy",
        str(loaded.config.model.name),
        {"k": 0, "seed": 3, "accuracy": 0.75},
        {"k": 2, "seed": 4, "accuracy": 0.25},
        {"k": 2, "seed": 3, "accuracy": 0.9, "noise_ratio": 0.1},
        {"k": 2, "seed": 3, "accuracy": 0.9, "clip": "off"},
        {"k": 2, "seed": 3, "accuracy": 0.9, "error": "lost"},
    )
    asked = dataclasses.replace(loaded, options={**loaded.options, "accuracy": place})
    rows = carry_out(asked, tmp_path / "run")

    assert [{**r, "accuracy": None} for r in rows] == before
    found = {(r["k"], r["seed"]): r["accuracy"] for r in rows}
    assert found == {(0, 0): 0.75, (0, 1): None, (2, 0): None, (2, 1): 0.25}


def test_a_level_is_in_the_mechanisms_own_unit(material: Path) -> None:
    for mechanism, own in (("dchi", "eta"), ("gaussian", "epsilon"), ("pac", "budget")):
        loaded = experiment("sap-depth", material, **DEPTH)
        run = {**loaded.run, **NOISE, "privacy.mechanism": mechanism}
        run |= {"privacy.delta": 1e-5} if mechanism == "gaussian" else {}
        config = dataclasses.replace(loaded, run=run).config
        setting = depth_experiment.DepthSetting(config, DEPTH)
        law = setting.law(2)
        assert depth_experiment.level_of(law) == getattr(law, own) > 0


def test_a_folder_without_accuracies_is_named(material: Path, tmp_path: Path) -> None:
    loaded = experiment("sap-depth", material)
    model = str(loaded.config.model.name)
    plain = {"k": 0, "seed": 0}
    for place, message in (
        (str(tmp_path / "nowhere"), r"nowhere'.*: must be the folder of a sweep's run"),
        (sweep_of(tmp_path / "other", "gpt2", plain), r"model\.name='gpt2': must be"),
        (sweep_of(tmp_path / "twice", model, plain, plain), "one row of mechanism=dchi, eta="),
    ):
        with pytest.raises(ConfigError, match=rf"options\.accuracy=.*{message}"):
            KnownAccuracy(place, loaded.config)
    with RunFolder(tmp_path / "rows", name="a", kind="table") as folder:
        folder.write_config(loaded.config.to_flat())
        folder.record(rows=[{"k": 0, "accuracy": 1.0}])
    with pytest.raises(ConfigError, match=r"rows must have .*noise_ratio"):
        KnownAccuracy(str(tmp_path / "rows"), loaded.config)


def test_states_are_what_each_bottom_sends(material: Path):
    model = load(material, "sequence-classification", num_labels=3).model
    deepest = split(model, 2)[0].eval()
    ids = [torch.tensor([2, 9, 8, 3]), torch.tensor([2, 50, 3])]

    found = depth_experiment.states(deepest, ids)

    for k in range(3):
        bottom = split(model, k)[0].eval()
        for x, hidden in zip(ids, found[k], strict=True):
            expected = bottom(x[None], torch.ones_like(x[None]))[0]
            assert torch.allclose(hidden, expected, atol=1e-5)


LEVELS = ["none", "nearest-token:5", "dchi:0.3"]


def test_attributes_show_with_and_without_noise(material: Path, tmp_path: Path):
    loaded = experiment("attributes", material, seeds=1, depths=[0], mechanisms=LEVELS, samples=240)
    with RunFolder(tmp_path / "run", name="a", kind="table") as folder:
        attributes_experiment.run(loaded, folder, QUIET)
    rows = read_results(tmp_path / "run")["rows"]

    assert {"data", "attribute", "mechanism", "eta", "k", "seed", "auc", "accuracy"} <= set(rows[0])
    assert {"majority", "task_accuracy", "task_majority"} <= set(rows[0])
    assert len(rows) == 2 * len(LEVELS)
    for data in ("isear", "womens-clothing"):
        clean, _, strong = (r for r in rows if r["data"] == data)
        assert clean["auc_low"] > 0.6
        assert clean["task_accuracy"] > clean["task_majority"]
        assert strong["auc"] < clean["auc"]


def test_wrong_settings_are_named(material: Path, tmp_path: Path):
    with RunFolder(tmp_path / "a", name="d", kind="table") as folder:
        with pytest.raises(ConfigError, match=r"options\.x"):
            depth_experiment.run(experiment("sap-depth", material, x=1), folder, QUIET)
        with pytest.raises(ConfigError, match="attack='y'"):
            depth_experiment.run(experiment("sap-depth", material, attacks=["y"]), folder, QUIET)
        with pytest.raises(DataError, match="missing"):
            attributes_experiment.run(_elsewhere(material, tmp_path), folder, QUIET)
        folder.mark("failed")


def _elsewhere(material: Path, folder: Path):
    (folder / "empty").mkdir()
    loaded = experiment("attributes", material)
    return dataclasses.replace(loaded, run={**loaded.run, "data.path": str(folder / "empty")})


def test_other_settings_or_a_torn_line_start_a_cell_anew(tmp_path: Path):
    path, calls = tmp_path / "cells.jsonl", []

    def make() -> list[dict[str, Any]]:
        calls.append(1)
        return [{"a": len(calls)}]

    first = CellStore(path, {"n": 1}).rows({"k": 0}, make)
    with path.open("a") as file:
        file.write('{"settings": "torn')
    assert CellStore(path, {"n": 1}).rows({"k": 0}, make) == first
    other = CellStore(path, {"n": 2}).rows({"k": 0}, make)  # the first line after the torn one
    assert other != first
    assert CellStore(path, {"n": 2}).rows({"k": 0}, make) == other
    assert len(calls) == 2
    # The cells are older than this setting of runs: they were made at its default.
    usual, strange = RunConfig().to_flat()["train.lr"], 0.5
    assert CellStore(path, {"n": 2, "train.lr": usual}).rows({"k": 0}, make) == other
    assert CellStore(path, {"n": 2, "train.lr": strange}).rows({"k": 0}, make) != other


def test_the_benchmark_finds_what_faiss_finds(material: Path, tmp_path: Path):
    pytest.importorskip("faiss")
    out = tmp_path / "bench.json"

    bench_inversion.run(QUIET, out, model=str(material), tokens=64, repeats=3, threads=1)

    rows = json.loads(out.read_text())["rows"]
    assert [row["top_k"] for row in rows] == [1, 10]
    assert all(row["agreement"] == 1.0 and row["ratio"] > 0 for row in rows)


def test_the_benchmark_says_how_to_get_faiss(monkeypatch):
    monkeypatch.setattr(bench_inversion.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RunError, match="pip install faiss-cpu"):
        bench_inversion.run(QUIET)
