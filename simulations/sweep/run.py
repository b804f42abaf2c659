"""Sweeps: many cells on Ray, resumable; one table, one Parquet file, one frontier plot.

``options.public-text`` is the prior's text of the cells that denoise.
``options.known`` names an earlier sweep's Parquet file, whose cells are taken as they are.
A cell's row is written to ``cells/KEY.json`` as soon as it is known, under a digest of everything
that decides it.  A sweep that was killed, or that is started again with more cells or seeds, runs
only what is missing; a cell that broke is a row with its error, and the next start tries it again.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from fedsplit import storage
from fedsplit.errors import ConfigError, RunError, check
from simulations.core.progress import RunProgress
from simulations.core.run_folder import RunFolder, strict, write_atomically
from simulations.core.settings import Experiment
from simulations.runtime.environment import ray_credentials
from simulations.sweep.cell import run_cell
from simulations.sweep.frontier import frontier_table, plot_frontier, summarise
from simulations.sweep.plan import Cell, cells_of, with_public_text

OPTIONS: dict[str, Any] = {
    "seeds": 1,
    "workers": 0,
    "attack-samples": 400,
    "cells": [],
    "known": "",
    "public-text": "",
}


def run(experiment: Experiment, folder: RunFolder, console: Console) -> None:
    """Run or continue the sweep in ``folder``.

    Raises:
        ConfigError: a bad option, or a setting out of range in any cell, before anything runs.
        RunError: every cell failed, or Ray cannot be started.
    """
    unknown = experiment.options.keys() - OPTIONS.keys()
    if unknown:
        raise ConfigError(f"options.{sorted(unknown)[0]}: must be one of {', '.join(OPTIONS)}")
    options = {**OPTIONS, **experiment.options}
    fixed = {"output.threads": 1, "output.owner-threads": 1, "output.save": False}
    run_settings = {**experiment.run, **fixed}
    groups = with_public_text(options["cells"], str(options["public-text"]))
    cells = cells_of(run_settings, groups, int(options["seeds"]))
    workers = int(options["workers"]) or min(os.cpu_count() or 1, len(cells))
    check(1 <= workers <= 1024, "options.workers", workers, "in [1, 1024]")
    folder.write_config(experiment.config.to_flat())
    store = CellStore(folder.path / "cells", str(options["known"]))
    rows = {cell.key: row for cell in cells if (row := store.load(cell)) is not None}
    missing = [cell for cell in cells if cell.key not in rows]
    console.print(f"{len(cells)} cells, {len(rows)} of them known, {workers} at once")
    folder.record(about=experiment.about, rows=_ordered(cells, rows), cells=len(cells))
    began = time.perf_counter()
    with RunProgress(console) as progress:
        progress.stage("cells")
        work = folder.path / "work"
        for cell, row in run_cells(missing, work, int(options["attack-samples"]), workers):
            rows[cell.key] = row = {**row, "key": cell.key}
            store.save(cell, row)
            folder.record(rows=_ordered(cells, rows))
            progress.say(f"  {_told(row)}")
            progress.update(len(rows) / len(cells))
    done = _ordered(cells, rows)
    broken = [row for row in done if row.get("error")]
    summary = summarise(done)
    folder.record(rows=done, summary=summary, broken=len(broken), sweep_s=_since(began))
    write_parquet(done, folder.path / "results.parquet")
    if len(broken) == len(done):
        raise RunError(f"all {len(done)} cells failed; the first: {broken[0]['error']}")
    console.print(frontier_table(summary))
    picture = folder.path / "frontier.png"
    if plot_frontier(summary, picture):
        console.print(f"picture: {picture}")
    for row in broken[:5]:
        console.print(f"[yellow]broken[/yellow] {_told(row)}")


class CellStore:
    """Rows on disk, one file per cell; an unreadable file counts as missing.

    Args:
        folder: where the files are.
        known: a Parquet file that another sweep left, whose cells need not be run again; empty or
            missing = none.

    Raises:
        RunError: ``known`` is there and cannot be read.
    """

    def __init__(self, folder: Path, known: str = "") -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._known = read_parquet(Path(known)) if known and Path(known).exists() else {}

    def load(self, cell: Cell) -> dict[str, Any] | None:
        """Return the cell's row, or None where it is not known (or broke)."""
        try:
            row = json.loads((self._folder / f"{cell.key}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            row = self._known.get(cell.key)
        if not isinstance(row, dict) or row.get("error"):
            return None
        return {**row, **cell.columns(), "key": cell.key}  # JSON has no infinity, the cell has

    def save(self, cell: Cell, row: Mapping[str, Any]) -> None:
        """Write the cell's row, whole or not at all."""
        text = json.dumps(strict(row, "", []), indent=1)
        write_atomically(self._folder / f"{cell.key}.json", text.encode())


def run_cells(
    cells: Sequence[Cell], work: Path, attack_samples: int, workers: int
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Run cells on Ray and yield each with its row as it comes; a broken one's row has ``error``.

    Raises:
        RunError: Ray cannot be started.
    """
    if not cells:
        return
    # A cluster of this sweep alone; Ray reads this once, when it is imported.
    if "ray" not in sys.modules and "RAY_ADDRESS" not in os.environ:
        os.environ.update({**ray_credentials(), **os.environ})
    import ray

    root = str(Path(__file__).resolve().parents[2])
    environment = {
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(
            num_cpus=workers,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": environment},
        )
    except Exception as error:  # Ray raises many kinds
        raise RunError(f"Ray cannot be started: {type(error).__name__}: {error}") from None
    try:
        remote = ray.remote(num_cpus=1, max_retries=1, max_calls=1)(run_cell)
        waiting = list(cells)
        running: dict[Any, Cell] = {}
        while waiting or running:
            while waiting and len(running) < workers:  # the driver holds no queue that a kill loses
                cell = waiting.pop(0)
                running[remote.remote(cell, work / cell.key, attack_samples)] = cell
            done, _ = ray.wait(list(running), num_returns=1)
            for reference in done:
                cell = running.pop(reference)
                try:
                    yield cell, ray.get(reference)
                except Exception as error:  # one broken cell must not end the sweep
                    cause = getattr(error, "cause", None) or error
                    reason = f"{type(cause).__name__}: {cause}"
                    yield cell, {**cell.columns(), "error": reason[:2000]}
    finally:
        ray.shutdown()


def write_parquet(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write rows, whose keys may differ, as one Parquet table."""
    import pyarrow
    import pyarrow.parquet

    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [row.get(name) for row in rows] for name in names}
    with storage.replacing(path, durable=False) as draft:
        pyarrow.parquet.write_table(pyarrow.table(columns), draft)


def read_parquet(path: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of a sweep's Parquet file by their keys.

    Raises:
        RunError: it cannot be read.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise RunError(f"{path}: must be a sweep's Parquet file: {error}") from None
    return {
        str(r["key"]): {k: v for k, v in r.items() if v is not None} for r in rows if "key" in r
    }


def _ordered(cells: Sequence[Cell], rows: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [rows[cell.key] for cell in cells if cell.key in rows]


def _told(row: Mapping[str, Any]) -> str:
    name = f"{row['variant']}, eta {row['eta']:g}, k {row['k']}, seed {row['seed']}"
    if row.get("error"):
        return f"{name}: {row['error']}"
    accuracy = row.get("accuracy")
    text = f"{name}: accuracy {100 * accuracy:.1f} %" if accuracy is not None else name
    if "empirical_privacy" in row:
        text += f", EP {100 * row['empirical_privacy']:.1f} %"
        text += f" ({100 * row['empirical_privacy_map']:.1f} % {row['strongest_attack']})"
    return f"{text}, {row['seconds']:.0f} s"


def _since(began: float) -> float:
    return time.perf_counter() - began
