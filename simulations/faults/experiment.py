"""The kind ``faults``: what is lost, and how soon work goes on, for one fault after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.table import Table

from fedsplit.errors import ConfigError, check
from simulations.core.run_folder import RunFolder
from simulations.core.settings import Experiment

OPTIONS: dict[str, Any] = {
    "sessions": [],
    "session-moments": [0.1, 0.3, 0.5, 0.7, 0.9],
    "processes": [],
    "process-moments": ["training"],
    "supernodes": 3,
}
Row = dict[str, Any]


def run(experiment: Experiment, folder: RunFolder, console: Console) -> None:
    """Carry out the cases; what was found is written after each.

    Raises:
        ConfigError: an unknown case or moment.
        FedsplitError: the undisturbed run failed.
    """
    unknown = experiment.options.keys() - OPTIONS.keys()
    if unknown:
        raise ConfigError(f"options.{sorted(unknown)[0]}: must be one of {', '.join(OPTIONS)}")
    options = {**OPTIONS, **experiment.options}
    config = experiment.config
    folder.write_config({**config.to_flat(), "options": options})
    rows: list[Row] = []
    for row in _all(experiment, options, folder):
        rows.append(row)
        folder.record(rows=rows)
        console.print(f"{row['case']}, {row['moment']}: lost {row['lost']}")
    table = Table("case", "moment", "lost", "recovered (s)", "note")
    for row in rows:
        seconds = row["recovered_s"]
        told = "" if seconds is None else f"{seconds:.1f}"
        table.add_row(row["case"], row["moment"], row["lost"], told, row["note"])
    console.print(table)


def _all(experiment: Experiment, options: dict[str, Any], folder: RunFolder) -> Iterator[Row]:
    config = replace(
        experiment.config,
        train=replace(experiment.config.train, min_owners=experiment.config.data.owners),
    )
    if options["sessions"]:
        from simulations.faults.bench import Bench
        from simulations.faults.sessions import CASES

        moments = [float(m) for m in options["session-moments"]]
        for name in options["sessions"]:
            if name not in CASES:
                raise ConfigError(f"options.sessions={name!r}: must be one of {', '.join(CASES)}")
        for moment in moments:
            check(0 < moment < 1, "options.session-moments", moment, "in (0, 1)")
        bench = Bench(config, folder.path / "sessions")
        for name in options["sessions"]:
            yield from CASES[name](bench, name, moments)
    if options["processes"]:
        from simulations.faults.processes import cases

        yield from cases(config, options, folder.path / "processes")
