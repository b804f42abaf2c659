"""The kind ``task-parity``: a task's scores, federated beside centralised, over seeds.

Each cell is one whole federated run and its centralised twin: the same model, data, steps and
learning rates in one process (:mod:`simulations.split.centralised`).  Rows: ``seed``, ``metric``,
``federated``, ``centralised``.
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

    def make(seed: int) -> list[Row]:
        return run_cell(replace(config, seed=config.seed + seed), folder.path / "cell")

    rows = run_cells(
        experiment, folder, console, store, product(seed=range(options["seeds"])), make
    )
    chosen = [row for row in rows if row["metric"] in options["metrics"]]
    folder.record(rows=chosen, all_rows=rows)
    console.print(table(chosen))


def run_cell(config: RunConfig, folder: Path) -> list[Row]:
    """Run one federation and its twin; return a row per score that both have.

    Raises:
        RunError: the federation reported none.
    """
    began = time.perf_counter()
    try:
        config, server = run_in_process(config, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found = [r["evaluate"]["metrics"] for r in server["rounds"] if "evaluate" in r][-1]
    between = time.perf_counter()
    owners = owner_samples(config, load_base(config).tokenizer)
    waves = [row["train"]["waves"] for row in server["rounds"]]
    twin = CentralisedTwin(config, owners).run(waves)
    ended = time.perf_counter()
    common = {"texts": found["num-examples"], "steps": twin.steps}
    common |= {"federated_s": between - began, "centralised_s": ended - between}
    rows = [
        {"seed": config.seed, "metric": key, "federated": found[key], "centralised": value}
        | {"zero_shot": twin.zero_shot.get(key), **common}
        for key, value in twin.metrics.items()
        if isinstance(value, float) and isinstance(found.get(key), float)
    ]
    if not rows:
        raise RunError(f"seed {config.seed}: the owners reported no score")
    return rows


def table(rows: Sequence[Row]) -> Table:
    """Return a table with each metric's mean over seeds, and the largest difference of a seed."""
    cells = []
    for (metric,), group in grouped(rows, "metric").items():
        worst = max(abs(row["federated"] - row["centralised"]) for row in group)
        means = [f"{mean(group, key):.4f}" for key in ("federated", "centralised", "zero_shot")]
        cells.append([metric, *means, f"{100 * worst:.2f} points", len(group)])
    columns = ("metric", "federated", "centralised", "before", "largest difference", "seeds")
    return make_table(columns, cells)
