"""Sweeps: every cell once, nothing done twice, one broken cell costs itself alone."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from fedsplit.errors import ConfigError, RunError
from simulations.core.run_folder import RunFolder, read_results
from simulations.core.settings import Experiment, load_experiment
from simulations.sweep import run as sweep
from simulations.sweep.cell import run_cell, template, template_floor
from simulations.sweep.frontier import level, summarise
from simulations.sweep.plan import Cell, as_sweep, cells_of, parse_axis, with_public_text

DCHI = {"privacy.mechanism": "dchi"}
GROUPS = [
    {"variant": "plain", "privacy.mechanism": "none"},
    {"variant": "noisy", **DCHI, "privacy.eta": [12.0, 8.0]},
]


@settings(deadline=None)
@given(
    etas=st.lists(st.floats(0.5, 100), min_size=1, max_size=4, unique=True),
    depths=st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True),
    seeds=st.integers(1, 3),
)
def test_axes_multiply_and_every_cell_has_a_key_of_its_own(
    etas: list[float], depths: list[int], seeds: int
) -> None:
    cells = cells_of({}, [{**DCHI, "privacy.eta": etas, "split.k": depths}], seeds)
    assert len(cells) == len(etas) * len(depths) * seeds
    assert len({cell.key for cell in cells}) == len(cells)
    assert {(c.config.privacy.eta, c.config.split.k, c.config.seed) for c in cells} == {
        (eta, k, seed) for eta in etas for k in depths for seed in range(seeds)
    }


def test_where_a_cell_writes_does_not_change_its_key() -> None:
    (a,) = cells_of({"output.dir": "x", "output.threads": 1}, [], 1)
    (b,) = cells_of({"output.dir": "y", "output.threads": 2}, [], 1)
    (c,) = cells_of({"train.lr": 0.5}, [], 1)
    assert a.key == b.key != c.key


@pytest.mark.parametrize(
    ("groups", "told"),
    [
        ([{**DCHI, "privacy.eta": [8.0, -1.0]}], "privacy.eta=-1.0"),
        ([{"privacy.nose": [1]}], "privacy.nose"),
        ([{**DCHI, "privacy.eta": [8.0, 8.0]}], "twice"),
        ([{"seed": [1, 5]}], "axis seed: must be left out"),
    ],
)
def test_a_bad_cell_is_refused_before_any_runs(groups: list[dict[str, Any]], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        cells_of({}, groups, 1)


def test_axes_of_the_command_line() -> None:
    assert parse_axis("split.k=0,1") == ("split.k", [0, 1])
    assert parse_axis("privacy.denoise=off,unigram") == ("privacy.denoise", ["off", "unigram"])
    with pytest.raises(ConfigError, match="key=value"):
        parse_axis("split.k")
    demo = as_sweep(load_experiment("demo"), {"privacy.eta": [12.0, 10.0]}, 2, 1)
    assert len(cells_of(demo.run, demo.options["cells"], demo.options["seeds"])) == 4
    with pytest.raises(ConfigError, match="kind"):
        as_sweep(Experiment("x", "table", "", {}), {}, 1, 1)


def fake(calls: list[Cell], broken: set[float]) -> Any:
    def run_cells(
        cells: Sequence[Cell], work: Path, samples: int, workers: int
    ) -> Iterator[tuple[Cell, dict[str, Any]]]:
        for cell in cells:
            calls.append(cell)
            if cell.config.privacy.eta in broken:
                yield cell, {**cell.columns(), "error": "ModelError: no"}
                continue
            figures = {"accuracy": 0.5 + 0.1 * cell.config.seed, "seconds": 1.0}
            yield cell, {**cell.columns(), **figures}

    return run_cells


def test_a_second_start_runs_only_what_is_missing(tmp_path: Path) -> None:
    calls: list[Cell] = []
    console = Console(file=io.StringIO())
    experiment = Experiment("s", "sweep", "", {}, {"seeds": 2, "cells": GROUPS})

    with RunFolder(tmp_path, name="s", kind="table") as folder:
        sweep.run(experiment, folder, console, fake(calls, {8.0}))
    first = read_results(tmp_path)
    assert len(calls) == len(first["rows"]) == 6
    assert first["broken"] == 2

    calls.clear()
    with RunFolder(tmp_path, name="s", kind="table", force=True) as folder:
        sweep.run(experiment, folder, console, fake(calls, set()))
    second = read_results(tmp_path)
    assert {c.config.privacy.eta for c in calls} == {8.0}
    assert second["broken"] == 0
    assert [r["seed"] for r in second["rows"]] == [0, 0, 0, 1, 1, 1]

    import pyarrow.parquet

    table = pyarrow.parquet.read_table(tmp_path / "results.parquet").to_pylist()
    assert [r["variant"] for r in table] == [r["variant"] for r in second["rows"]]
    assert math.isinf(table[0]["eta"])

    calls.clear()
    known = {"known": str(tmp_path / "results.parquet")}
    wider = Experiment("s", "sweep", "", {}, {**known, "seeds": 3, "cells": GROUPS})
    with RunFolder(tmp_path / "other", name="s", kind="table") as folder:
        sweep.run(wider, folder, console, fake(calls, set()))
    assert {c.config.seed for c in calls} == {2}
    assert len(read_results(tmp_path / "other")["rows"]) == 9


def test_a_sweep_of_which_nothing_came_is_a_failure(tmp_path: Path) -> None:
    experiment = Experiment("s", "sweep", "", {}, {"cells": GROUPS[1:]})
    with (
        pytest.raises(RunError, match="all 2 cells failed"),
        RunFolder(tmp_path, name="s", kind="table") as folder,
    ):
        sweep.run(experiment, folder, Console(file=io.StringIO()), fake([], {8.0, 12.0}))
    assert read_results(tmp_path)["status"] == "failed"


def test_the_template_is_kept_by_its_rules_and_by_what_was_measured(make_config: Any) -> None:
    """A cell below the floor breaks it whatever its settings; above, its rules are asked too."""
    keeps = {"privacy__mechanism": "dchi", "privacy__noise_ratio": 20.0}
    cases = [
        ({**keeps, "privacy__row_clip": "auto"}, 1.0, "yes"),
        (keeps, 1.0, "floor"),  # not clipped
        ({**keeps, "privacy__mechanism": "gaussian", "privacy__row_clip": "auto"}, 1.0, "floor"),
        ({**keeps, "privacy__row_clip": "auto"}, None, "no"),
    ]
    if template_floor():
        cases.append(({**keeps, "privacy__row_clip": "auto"}, template_floor() - 0.01, "no"))

    for options, measured, told in cases:
        assert template(make_config(**options), measured) == told

    base = {**cells_of({}, [{}], 1)[0].columns(), "accuracy": 0.5}
    rows = [{**base, "seed": i, "template": x} for i, x in enumerate(("yes", "floor", "yes"))]
    assert summarise(rows)[0]["template"] == "floor"
    assert summarise([base])[0]["template"] == "-"


def test_levels_are_told_in_the_unit_that_was_set() -> None:
    def told(**more: Any) -> str:
        return level({"eta": math.inf, "noise_ratio": 0.0, "spare": 1.0, **more})

    assert (told(), told(eta=8.0), told(noise_ratio=6.0)) == ("no noise", "8", "r 6")
    assert told(noise_ratio=0.5, spare=0.1) == "r 0.5 / 0.1"


def test_intervals_are_those_of_the_mean() -> None:
    base = cells_of({}, [{}], 1)[0].columns()
    rows = [{**base, "seed": s, "accuracy": a} for s, a in enumerate((0.70, 0.72, 0.77))]
    (summary,) = summarise([*rows, {**base, "seed": 9, "error": "no"}])
    assert summary["seeds"] == 3
    assert summary["accuracy"] == pytest.approx(0.73)
    # 4.303 is the 97.5 % quantile of Student's t with 2 degrees of freedom.
    assert summary["accuracy_pm"] == pytest.approx(4.3027 * 0.036056 / math.sqrt(3), rel=1e-3)
    (one,) = summarise(rows[:1])
    assert one["accuracy_pm"] is None


def test_cells_of_an_earlier_version_are_read_and_broken_ones_run_again(tmp_path: Path) -> None:
    cells = cells_of({}, GROUPS, 1)
    (tmp_path / "cells").mkdir()
    rows = ({"accuracy": 0.25, "eta": None}, {"error": "ModelError: no"}, None)
    for cell, row in zip(cells, rows, strict=True):
        text = json.dumps(row) if row else '{"accuracy": 0.'
        (tmp_path / "cells" / f"{cell.key}.json").write_text(text)
    calls: list[Cell] = []
    experiment = Experiment("s", "sweep", "", {}, {"cells": GROUPS})
    with RunFolder(tmp_path, name="s", kind="table") as folder:
        sweep.run(experiment, folder, Console(quiet=True), fake(calls, set()))
    assert [cell.key for cell in calls] == [cell.key for cell in cells[1:]]
    found = read_results(tmp_path)["rows"]
    assert [row["accuracy"] for row in found] == [0.25, 0.5, 0.5]


def small_run(make_config: Any) -> dict[str, Any]:
    """Return flat settings of two owners' short run."""
    config = make_config(data__owners=2, train__rounds=1, session__codec="fp32")
    # Workers that share a core with other tests import for a while before their first frame.
    patient = {"session.deadline-s": 200.0, "session.wave-wait-s": 200.0}
    return {k: v for k, v in config.to_flat().items() if k != "output.dir"} | patient


def test_a_cell_without_noise_hides_nothing(make_config: Any, tmp_path: Path) -> None:
    (cell,) = cells_of(small_run(make_config), [{"variant": "plain"}], 1)
    row = run_cell(cell, tmp_path / "cell", 400)
    assert row["empirical_privacy"] == 0.0
    assert row["read_embedding_inversion"] == 1.0
    assert row["read_embedding_inversion_low"] < 1.0 == row["read_embedding_inversion_high"]
    assert not (tmp_path / "cell").exists()


@pytest.mark.slow
def test_real_cells_on_ray(make_config: Any, tmp_path: Path) -> None:
    groups = [
        {"variant": "noisy", **DCHI, "privacy.eta": 3.0},
        {"variant": "broken", "split.k": 99},
    ]
    options = {"cells": groups, "workers": 2}
    experiment = Experiment("s", "sweep", "", small_run(make_config), options)
    with RunFolder(tmp_path / "s", name="s", kind="table") as folder:
        sweep.run(experiment, folder, Console(file=io.StringIO()))
    rows = {r["variant"]: r for r in read_results(tmp_path / "s")["rows"]}
    assert rows["noisy"]["empirical_privacy"] > 0.0
    assert "k=99" in rows["broken"]["error"]
    assert (tmp_path / "s" / "frontier.png").stat().st_size > 10_000
    assert not list((tmp_path / "s" / "work").glob("*"))
    assert json.loads((tmp_path / "s" / "results.json").read_text())["broken"] == 1


def test_public_text_is_for_the_cells_that_denoise(tmp_path: Path) -> None:
    groups = [{"privacy.eta": 8.0}, {"privacy.denoise": "contextual"}]
    assert with_public_text(groups, "") == groups
    plain, denoising = with_public_text(groups, str(tmp_path))
    assert plain == groups[0]
    assert denoising == {"privacy.denoise": "contextual", "privacy.public-text": str(tmp_path)}
    with pytest.raises(ConfigError, match=r"options\.public-text='.*nowhere': must be"):
        with_public_text(groups, str(tmp_path / "nowhere"))
