"""Experiment files and overrides."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

import simulations
from fedsplit.errors import ConfigError
from simulations.__main__ import BENCHMARKS, app
from simulations.core.kinds import KINDS
from simulations.core.run_folder import RunFolder, read_results
from simulations.core.settings import Experiment, load_experiment, names, read_options
from simulations.sweep.plan import cells_of


@pytest.mark.parametrize("name", names())
def test_every_experiment_that_ships_is_valid(name: str) -> None:
    experiment = load_experiment(name)
    assert experiment.about
    assert experiment.config.seed == 0


def test_overrides_are_typed_and_paths_become_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "texts.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path)
    changes = ["train.rounds=5", "privacy.eta=8.5", "model=gpt2", "data.path=texts.jsonl"]
    config = load_experiment("demo", changes).config
    assert config.train.rounds == 5
    assert config.privacy.eta == 8.5
    assert config.model.name == "gpt2"
    assert config.data.path == str(tmp_path / "texts.jsonl")


def test_a_checksum_goes_with_the_model_it_belongs_to() -> None:
    pinned = load_experiment("demo").config.model
    assert pinned.sha256
    assert load_experiment("demo", ["model=gpt2"]).config.model.sha256 == ""
    assert load_experiment("demo", ["model=gpt2", "model.sha256=ab"]).config.model.sha256 == "ab"
    same = load_experiment("demo", [f"model={pinned.name}", "seed=1"]).config.model
    assert same.sha256 == pinned.sha256
    run = load_experiment("demo").run
    first, second = cells_of(run, [{"model.name": [pinned.name, "gpt2"]}], 1)
    assert (first.config.model.sha256, second.config.model.sha256) == (pinned.sha256, "")


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("nothing", "seed=1", "experiment='nothing': must be one of"),
        ("demo", "seed", "must be key=value"),
        ("demo", "train.nothing=1", "train.nothing=1: unknown setting"),
        ("demo", "privacy.eta=-2.0", "privacy.eta=-2.0: must be > 0"),
        ("demo", "split.k=-1", "split.k=-1"),
        ("demo", "train.rounds=many", "train.rounds='many': must be of type int"),
    ],
)
def test_what_is_wrong_is_named_before_anything_starts(
    name: str, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_experiment(name, [override])


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    # as editors of some systems save it
    path.write_text('\ufeffkind = "split"\r\nabout = "x"\r\n[run.train]\r\nrounds = 7\r\n')
    assert load_experiment(str(path)).config.train.rounds == 7
    path.write_text("kind = 3 = 4")
    with pytest.raises(ConfigError, match=r"mine\.toml"):
        load_experiment(str(path))


def test_options_are_their_defaults_types() -> None:
    defaults = {"lr": 0.5, "steps": 3, "names": ["a"], "on": True}
    assert read_options({}, defaults) == defaults
    assert read_options({"lr": 1, "names": []}, defaults) == {**defaults, "lr": 1.0, "names": []}
    for wrong in ({"steps": 1.5}, {"steps": True}, {"on": 1}, {"names": "a"}, {"lr": "x"}):
        with pytest.raises(ConfigError, match=r"options\.\w+=.*must be of type"):
            read_options(wrong, defaults)
    with pytest.raises(ConfigError, match=r"options\.stepz: must be one of lr, steps"):
        read_options({"stepz": 1}, defaults)


def test_every_kind_is_shipped_as_an_experiment_and_can_be_carried_out() -> None:
    assert {load_experiment(name).kind for name in names()} == set(KINDS)
    listed = CliRunner().invoke(app, ["list"], env={"COLUMNS": "300"})
    assert all(name in listed.output for name in (*names(), *KINDS))


def test_a_new_benchmark_is_one_file_and_one_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "toy_benchmark.py").write_text(
        "from __future__ import annotations\n"
        "def run(console, size: int = 1):\n"
        '    """Measure a toy."""\n'
        "    console.print(f'size {size + 1}')\n"
    )
    monkeypatch.setattr("simulations.__path__", [*simulations.__path__, str(tmp_path)])
    monkeypatch.setitem(BENCHMARKS, "toy", "toy_benchmark")
    listed = CliRunner().invoke(app, ["bench", "--help"], env={"COLUMNS": "200"})
    assert all(name in listed.output for name in BENCHMARKS)
    assert "Measure a toy." in listed.output
    done = CliRunner().invoke(app, ["bench", "toy", "--size", "3"])
    assert done.exit_code == 0, done.output
    assert "size 4" in done.output


def test_a_new_kind_is_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(experiment: Experiment, folder: RunFolder, console: Console) -> None:
        folder.record(rows=[read_options(experiment.options, {"size": 1})])

    monkeypatch.setitem(KINDS, "toy", run)
    path = tmp_path / "toy.toml"
    path.write_text('kind = "toy"\nabout = "x"\n[options]\nsize = 3\n')
    done = CliRunner().invoke(app, ["run", str(path), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert read_results(tmp_path / "out")["rows"] == [{"size": 3}]
