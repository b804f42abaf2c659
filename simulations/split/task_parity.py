"""The kind ``task-parity``: a task's scores, federated beside centralised, over seeds.

A seed has two cells: a whole federated run, and its centralised twin with the same model, data,
steps and learning rates in one process (:mod:`simulations.split.centralised`).  Rows: ``seed``,
``metric``, ``federated``, ``centralised``, and the metric ``before`` any step.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedsplit.config import RunConfig
from fedsplit.errors import ConfigError, RunError
from simulations.core.cells import CellStore, Row, product, run_cells
from simulations.core.owner_samples import owner_samples
from simulations.core.run_folder import RunFolder
from simulations.core.settings import Experiment, read_options
from simulations.core.tables import grouped, make_table, mean
from simulations.runtime.local_run import run_in_process
from simulations.split.centralised import CentralisedTwin
from strategies.base_model import load_base

WHERE = ("federated", "centralised")
OPTIONS: dict[str, Any] = {"seeds": 3, "metrics": ["accuracy"]}


def run(experiment: Experiment, folder: RunFolder, console: Console) -> None:
    """Carry out the experiment; finished cells are kept if it is killed.

    Raises:
        ConfigError: the data is not there, or an option is none.
        RunError: a run failed, or its owners reported none of the metrics.
    """
    options = read_options(experiment.options, OPTIONS)
    config = experiment.config
    if config.data.path and not Path(config.data.path).exists():
        raise ConfigError(
            f"data.path={config.data.path!r}: must be there; --set data.path=DIR names it"
        )
    store = CellStore.open(folder, config, options, ("seeds", "metrics"))

    def make(seed: int, where: str) -> list[Row]:
        own = replace(config, seed=config.seed + seed)
        began = time.perf_counter()
        found = federated(own, folder.path / "cell") if where == WHERE[0] else centralised(own)
        found["seconds"] = time.perf_counter() - began
        return [{"seed": own.seed, "where": where, "scores": found}]

    def recorded(rows: list[Row]) -> dict[str, Any]:
        return {"rows": beside(rows, options["metrics"])}

    keys = product(seed=range(options["seeds"]), where=WHERE)
    cells = run_cells(experiment, folder, console, store, keys, make, recorded)
    rows = beside(cells, options["metrics"])
    if not rows:
        raise RunError(f"options.metrics={options['metrics']!r}: must be scores of this task")
    console.print(table(rows))


def federated(config: RunConfig, folder: Path) -> dict[str, float]:
    """Run one federation in ``folder``, which is removed, and return its last scores."""
    try:
        config, server = run_in_process(config, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found = [r["evaluate"]["metrics"] for r in server["rounds"] if "evaluate" in r][-1]
    scores = {key: value for key, value in found.items() if isinstance(value, int | float)}
    return {**scores, "steps": sum(r["train"]["steps"] for r in server["rounds"])}


def centralised(config: RunConfig) -> dict[str, float]:
    """Train the twin, all owners in each step, and return its scores and those before any step."""
    owners = owner_samples(config, load_base(config).tokenizer)
    waves = [[[owner.name for owner in owners]]] * config.train.rounds
    twin = CentralisedTwin(config, owners).run(waves)
    scores = {key: value for key, value in twin.metrics.items() if isinstance(value, float)}
    before = {f"{k} before": v for k, v in twin.zero_shot.items() if isinstance(v, float)}
    return {**scores, **before, "steps": twin.steps}


def beside(cells: Sequence[Row], metrics: Sequence[str]) -> list[Row]:
    """Return a row for each seed and metric of which both sides are known."""
    rows = []
    for (seed,), group in grouped(cells, "seed").items():
        sides = {cell["where"]: cell["scores"] for cell in group}
        if len(sides) < len(WHERE):
            continue
        mine, theirs = (sides[where] for where in WHERE)
        rows += [
            {
                "seed": seed,
                "metric": metric,
                "federated": mine[metric],
                "centralised": theirs[metric],
                "before": theirs.get(f"{metric} before"),
                "texts": mine.get("covered", {})
                .get("scores", {})
                .get("texts", mine["num-examples"]),
                "steps": mine["steps"],
                "centralised_steps": theirs["steps"],
            }
            for metric in metrics
            if metric in mine and metric in theirs
        ]
    return rows


def table(rows: Sequence[Row]) -> Table:
    """Return a table with each metric's mean over seeds, and the largest difference of a seed."""
    cells = []
    for (metric,), group in grouped(rows, "metric").items():
        worst = max(abs(row["federated"] - row["centralised"]) for row in group)
        means = [f"{mean(group, key):.4f}" for key in ("federated", "centralised", "before")]
        cells.append([metric, *means, f"{100 * worst:.2f} points", len(group)])
    columns = ("metric", "federated", "centralised", "before", "largest difference", "seeds")
    return make_table(columns, cells)
