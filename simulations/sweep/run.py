"""Sweeps: many cells on Ray, resumable; one table, one Parquet file, one frontier plot.

``options.public-text`` is the prior's text of the cells that denoise.
``options.known`` names an earlier sweep's Parquet file, whose cells are taken as they are.
A cell's row is written to ``cells.jsonl`` as soon as it is known, under a digest of everything
that decides it (earlier versions wrote ``cells/KEY.json``; those are read).  A sweep that was
killed, or that is started again with more cells or seeds, runs only what is missing; a cell that
broke is a row with its error, and the next start tries it again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from fedsplit import storage
from fedsplit.errors import RunError, check
from simulations.core.cells import FILE, CellStore, Row
from simulations.core.plots import draw_if_possible
from simulations.core.progress import RunProgress
from simulations.core.run_folder import RunFolder
from simulations.core.settings import Experiment, read_options
from simulations.runtime.environment import RAY, ray_credentials
from simulations.sweep.cell import run_cell, template, template_floor
from simulations.sweep.frontier import frontier_table, level, plot_frontier, summarise
from simulations.sweep.plan import Cell, cells_of, with_public_text

OPTIONS: dict[str, Any] = {
    "seeds": 1,
    "workers": 0,
    "attack-samples": 400,
    "cells": [],
    "known": "",
    "public-text": "",
    "ray-address": "",
}


# cells, folder, attacked samples, cells at once -> each cell with its row, as it comes
Runner = Callable[[Sequence[Cell], Path, int, int], Iterator[tuple[Cell, Row]]]


def run(
    experiment: Experiment, folder: RunFolder, console: Console, runner: Runner | None = None
) -> None:
    """Run or continue the sweep in ``folder``.

    Args:
        experiment: of the kind ``sweep``.
        folder: of the run.
        console: where tables and progress go.
        runner: carries out the cells; None: :func:`run_cells`, on Ray here or on the cluster of
            ``options.ray-address``.

    Raises:
        ConfigError: a bad option, or a setting out of range in any cell, before anything runs.
        RunError: every cell failed, or Ray cannot be started.
    """
    options = read_options(experiment.options, OPTIONS)
    fixed = {"output.threads": 1, "output.owner-threads": 1, "output.save": False}
    run_settings = {**experiment.run, **fixed}
    groups = with_public_text(options["cells"], options["public-text"])
    cells = cells_of(run_settings, groups, options["seeds"])
    workers = options["workers"] or min(os.cpu_count() or 1, len(cells))
    check(1 <= workers <= 1024, "options.workers", workers, "in [1, 1024]")
    folder.write_config(experiment.config.to_flat())
    earlier = earlier_rows(folder.path / "cells", options["known"])
    store = CellStore(folder.path / FILE, {}, earlier)
    rows = {
        cell.key: known_row(cell, found[0])
        for cell in cells
        if (found := store.find({"cell": cell.key}))
    }
    missing = [cell for cell in cells if cell.key not in rows]
    console.print(f"{len(cells)} cells, {len(rows)} of them known, {workers} at once")
    folder.record(about=experiment.about, rows=_ordered(cells, rows), cells=len(cells))
    began = time.perf_counter()
    with RunProgress(console) as progress:
        progress.stage("cells")
        work = folder.path / "work"
        runner = runner or partial(run_cells, address=options["ray-address"])
        for cell, row in runner(missing, work, options["attack-samples"], workers):
            rows[cell.key] = row = {**row, "key": cell.key}
            if not row.get("error"):
                store.save({"cell": cell.key}, [row])
            folder.record(rows=_ordered(cells, rows))
            progress.say(f"  {_told(row)}")
            progress.update(len(rows) / len(cells))
    done = _ordered(cells, rows)
    broken = [row for row in done if row.get("error")]
    summary = summarise(done)
    folder.record(
        rows=done, summary=summary, broken=len(broken), sweep_s=time.perf_counter() - began
    )
    write_parquet(done, folder.path / "results.parquet")
    if len(broken) == len(done):
        raise RunError(f"all {len(done)} cells failed; the first: {broken[0]['error']}")
    console.print(frontier_table(summary))
    draw_if_possible(
        console, folder.path / "frontier.png", plot_frontier, summary, template_floor()
    )
    for row in broken[:5]:
        console.print(Text("broken", "yellow"), _told(row))


def known_row(cell: Cell, found: Row) -> Row:
    """Return a finished cell's row; Parquet holds no infinity, and earlier rows no ``template``."""
    row: Row = {**found, **cell.columns(), "key": cell.key}
    if "template" not in row and "empirical_privacy_map" in row:
        row["template"] = template(cell.config, row["empirical_privacy_map"])
    return row


def earlier_rows(folder: Path, known: str) -> Iterator[tuple[dict[str, str], list[Row]]]:
    """Yield finished cells that were found elsewhere, as :class:`CellStore` takes them.

    Args:
        folder: where earlier versions wrote a file for each cell.
        known: a Parquet file that another sweep left; empty or missing = none.

    Raises:
        RunError: ``known`` is there and cannot be read.
    """
    found = read_parquet(Path(known)) if known and Path(known).exists() else {}
    for path in sorted(folder.glob("*.json")):
        with contextlib.suppress(OSError, ValueError):  # damaged: the cell is run again
            found[path.stem] = json.loads(path.read_text(encoding="utf-8"))
    for key, row in found.items():
        if isinstance(row, dict) and not row.get("error"):
            yield {"cell": key}, [row]


def run_cells(
    cells: Sequence[Cell], work: Path, attack_samples: int, workers: int, address: str = ""
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Run cells on Ray and yield each with its row as it comes; a broken one's row has ``error``.

    Args:
        cells: to be run.
        work: folder of their files, which are removed.
        attack_samples: see :func:`run_cell`.
        workers: cells at once.
        address: of a cluster, whose nodes find models and data under the same names; empty: one of
            this sweep's own.

    Raises:
        RunError: Ray cannot be started.
    """
    if not cells:
        return
    # A cluster of this sweep alone; Ray reads this once, when it is imported.
    if not address and "ray" not in sys.modules and "RAY_ADDRESS" not in os.environ:
        os.environ.update({**RAY, **ray_credentials(), **os.environ})
    import ray

    root = str(Path(__file__).resolve().parents[2])
    environment = {
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address:
            from simulations.runtime.hosts.ray_hosts import runtime_environment

            del environment["PYTHONPATH"]
            ray.init(address, runtime_env=runtime_environment(environment), **quiet)
        else:
            runtime = {"env_vars": environment}
            ray.init(num_cpus=workers, include_dashboard=False, runtime_env=runtime, **quiet)
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
                shutil.rmtree(work / cell.key, ignore_errors=True)  # of attempts that were killed
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
    name = f"{row['variant']}, {level(row)}, k {row['k']}, seed {row['seed']}"
    if row.get("error"):
        return f"{name}: {row['error']}"
    accuracy = row.get("accuracy")
    text = f"{name}: accuracy {100 * accuracy:.1f} %" if accuracy is not None else name
    if "empirical_privacy_map" in row:  # behind blocks there is no nearest neighbour
        text += f", EP {100 * row['empirical_privacy_map']:.1f} % ({row['strongest_attack']}"
        if "empirical_privacy" in row:
            text += f"; {100 * row['empirical_privacy']:.1f} % nearest"
        text += ")"
    return f"{text}, {row['seconds']:.0f} s"
