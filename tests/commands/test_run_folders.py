"""RUN is the server's own folder, or an experiment's that has it as ``server/``: every command."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from typer.testing import CliRunner

from fedsplit.cli import app_cli
from fedsplit.emulators import adapter_state, make_compressor
from fedsplit.emulators.compressors.base import Material
from fedsplit.emulators.files import save_emulator
from fedsplit.errors import ConfigError, ModelError
from fedsplit.models import load
from fedsplit.models.adapters.methods import MethodSettings
from fedsplit.models.adapters.trainable import make_trainable, method_options
from fedsplit.models.splitting.halves import split
from fedsplit.models.trained import find_server_folder, server_folder
from fedsplit.models.trained.weights import described, save_trained
from fedsplit.settings import read_settings
from tests.attacks.inversion.test_attack_files import make_run
from tests.tiny_models import WORDS, save_tiny_bert, save_tiny_llama

TEXT = " ".join(WORDS * 3)
LAYOUTS = pytest.mark.parametrize("below", [True, False], ids=["experiment", "server"])


def call(*arguments: Any) -> Any:
    """Run a command."""
    return CliRunner().invoke(app_cli, [str(a) for a in arguments])


def named(run: Path, below: bool) -> Path:
    """Return what a user names of an experiment's folder: itself, or what its server left."""
    return run if below else run / "server"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        "causal-lm": save_tiny_llama(tmp_path_factory.mktemp("llama")),
        "sequence-classification": save_tiny_bert(tmp_path_factory.mktemp("bert")),
    }


def split_run(folder: Path, base: Path, task: str) -> Path:
    """Make an experiment's folder with what a split run's server leaves below it."""
    flat = {"model.name": str(base), "model.task": task, "model.labels": 3, "split.k": 1}
    config = read_settings({**flat, "model.max-tokens": 16})
    loaded = load(base, task, num_labels=None if task == "causal-lm" else 3)
    _, top = split(loaded.model, 1, verify=False)
    trained = make_trainable(top, "all", **method_options(config.train))
    state = {n: p.detach() * 1.01 for n, p in trained.state().items()}
    (folder / "server").mkdir(parents=True)
    path = folder / "server" / "top.safetensors"
    save_trained(path, state, {}, described(config, loaded.digest))
    return folder


def offsite_run(folder: Path, base: Path) -> Path:
    """Make an experiment's folder with what an offsite run's server leaves below it."""
    server, loaded = folder / "server", load(base, "causal-lm")
    server.mkdir(parents=True)
    emulator = make_compressor("layerdrop", adapters=(0, 2), keep=1).build(loaded.model, Material())
    save_emulator(emulator, server / "emulator", tokenizer=loaded.tokenizer)
    about = {k: v for k, v in asdict(MethodSettings()).items() if k != "seed"}
    state = {name: 1.01 * tensor for name, tensor in adapter_state(emulator).items()}
    metadata = {"round": "1", "method": json.dumps(about)}
    save_file(state, server / "adapters.safetensors", metadata=metadata)
    shutil.copytree(base, server / "model")
    return folder


@LAYOUTS
def test_export_writes_beside_the_trained_top(
    bases: dict[str, Path], tmp_path: Path, below: bool
) -> None:
    run = split_run(tmp_path / "run", bases["causal-lm"], "causal-lm")

    done = call("export", named(run, below))

    assert done.exit_code == 0, done.output
    assert (run / "server" / "model" / "config.json").is_file()
    assert not (run / "model").exists()


@LAYOUTS
def test_evaluate_takes_a_split_run(bases: dict[str, Path], tmp_path: Path, below: bool) -> None:
    run = split_run(tmp_path / "run", bases["causal-lm"], "causal-lm")
    (tmp_path / "text.txt").write_text(TEXT)
    figures = tmp_path / "figures.json"

    done = call(
        *("evaluate", named(run, below), "--text", tmp_path / "text.txt"),
        *("--window", 32, "--out", figures),
    )

    assert done.exit_code == 0, done.output
    (row,) = json.loads(figures.read_text())["models"]
    assert row["label"] == "tuned by split"


@LAYOUTS
def test_evaluate_takes_a_split_run_with_labels(
    bases: dict[str, Path], tmp_path: Path, below: bool
) -> None:
    task = "sequence-classification"
    run = split_run(tmp_path / "run", bases[task], task)
    rows = [{"text": " ".join(WORDS[i : i + 5]), "label": i % 3} for i in range(12)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    done = call("evaluate", named(run, below), "--data", tmp_path / "texts.jsonl")

    assert done.exit_code == 0, done.output
    assert "accuracy" in done.output


@LAYOUTS
def test_evaluate_takes_an_offsite_run_and_its_adapters(
    bases: dict[str, Path], tmp_path: Path, below: bool
) -> None:
    base = bases["causal-lm"]
    run = named(offsite_run(tmp_path / "run", base), below)
    (tmp_path / "text.txt").write_text(TEXT)
    figures = tmp_path / "figures.json"
    given = ("--text", tmp_path / "text.txt", "--window", 32, "--out", figures)

    done = call("evaluate", run, "--base", base, *given)

    assert done.exit_code == 0, done.output
    assert [row["label"] for row in json.loads(figures.read_text())["models"]] == [
        *("full, zero-shot", "emulator, zero-shot", "emulator, tuned", "plug-in")
    ]
    done = call("evaluate", base, "--adapter", run, *given)
    assert done.exit_code == 0, done.output
    done = call("export", run)
    assert isinstance(done.exception, ModelError)
    assert "already, written when its run ended" in str(done.exception)


@LAYOUTS
@pytest.mark.parametrize("kind", ["split", "offsite"])
def test_compare_and_fingerprint_take_a_run(
    bases: dict[str, Path], tmp_path: Path, kind: str, below: bool
) -> None:
    base = bases["causal-lm"]
    if kind == "split":
        run = split_run(tmp_path / "run", base, "causal-lm")
    else:
        run = offsite_run(tmp_path / "run", base)

    assert call("compare", base, named(run, below), "--no-run").exit_code == 0  # in lineage
    done = call("fingerprint", named(run, below), "--sketch", "--out", tmp_path / "a.json")
    assert done.exit_code == 0, done.output


def test_compare_takes_a_base_that_moved(bases: dict[str, Path], tmp_path: Path) -> None:
    base = shutil.copytree(bases["causal-lm"], tmp_path / "base")
    run = split_run(tmp_path / "run", base, "causal-lm")
    there = base.rename(tmp_path / "there")

    assert call("compare", there, run, "--no-run").exit_code == 3
    assert call("compare", there, run, "--no-run", "--base", there).exit_code == 0
    done = call("fingerprint", run, "--sketch", "--base", there, "--out", tmp_path / "a.json")
    assert done.exit_code == 0, done.output
    done = call("compare", there, there, "--no-run", "--base", there)
    assert done.exit_code == 3
    assert "must be left out" in done.output
    assert isinstance(call("fingerprint", there, "--base", there).exception, ConfigError)


@pytest.mark.parametrize("place", ["run", "run/server", "alone"])
def test_an_attack_takes_a_run(bases: dict[str, Path], tmp_path: Path, place: str) -> None:
    run = make_run(tmp_path / "run", bases["sequence-classification"], 0)
    if place == "alone":  # what was recorded, with its settings and its truth beside
        shutil.copytree(run / "server", tmp_path / place)
        for name in ("config.toml", "truth.safetensors"):
            shutil.copy(run / name, tmp_path / place)

    figures = tmp_path / "figures.json"
    done = call("attack", "inversion", tmp_path / place, "--attack", "nearest", "--json", figures)

    assert done.exit_code == 0, done.output
    (row,) = json.loads(figures.read_text())
    assert row["success"] == 1.0


@LAYOUTS
def test_lineage_takes_a_run(tmp_path: Path, below: bool) -> None:
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "lineage.jsonl").touch()

    done = call("lineage", "verify", named(tmp_path, below))

    assert done.exit_code == 0, done.output
    assert "no records" in done.output


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("export", "RUN"), "must hold top.safetensors"),
        (("evaluate", "RUN", "--text", "TEXT"), "top.safetensors"),
        (("evaluate", "RUN", "--data", "TEXT"), "top.safetensors"),
        (("compare", "RUN", "RUN", "--no-run"), "top.safetensors"),
        (("fingerprint", "RUN"), "top.safetensors"),
        (("attack", "inversion", "RUN"), "must hold transcript.safetensors"),
        (("lineage", "verify", "RUN"), "lineage.jsonl"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_folder_without_a_run_is_told_what_it_must_hold(
    tmp_path: Path, arguments: tuple[str, ...], wanted: str
) -> None:
    run, text = tmp_path / "empty", tmp_path / "text.txt"
    (run / "server").mkdir(parents=True)
    (run / "config.toml").touch()
    text.write_text(TEXT)

    done = call(*({"RUN": run, "TEXT": text}.get(a, a) for a in arguments))

    assert done.exit_code != 0
    said = " ".join(f"{done.exception} {done.output}".split())
    assert str(run) in said.replace(" ", "")
    assert wanted in said


def test_the_folder_itself_is_looked_at_first(tmp_path: Path) -> None:
    (tmp_path / "server").mkdir()
    assert server_folder(tmp_path, "a", "b") is None
    with pytest.raises(ModelError, match=r"must hold a or b, itself or in server/; X leaves it"):
        find_server_folder(tmp_path, "a", "b", left_by="X")
    (tmp_path / "server" / "b").touch()
    assert server_folder(tmp_path, "a", "b") == tmp_path / "server"
    (tmp_path / "a").mkdir()
    assert find_server_folder(tmp_path, "a", "b", left_by="X") == tmp_path
