"""The kind ``faults``: what is lost, and how soon work goes on, for one fault after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from rich.console import Console

from fedsplit.errors import check
from fedsplit.registry import pick
from simulations.core.run_folder import RunFolder
from simulations.core.settings import Experiment, read_options
from simulations.core.tables import make_table

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
    options = read_options(experiment.options, OPTIONS)
    folder.write_config({**experiment.config.to_flat(), "options": options})
    rows: list[Row] = []
    for row in _all(experiment, options, folder):
        rows.append(row)
        folder.record(rows=rows)
        console.print(f"{row['case']}, {row['moment']}: lost {row['lost']}")
    columns = ("case", "moment", "lost", "recovered_s", "note")
    heads = ("case", "moment", "lost", "recovered (s)", "note")
    console.print(make_table(heads, ([row[c] for c in columns] for row in rows), left=5))


def _all(experiment: Experiment, options: dict[str, Any], folder: RunFolder) -> Iterator[Row]:
    config = replace(
        experiment.config,
        train=replace(experiment.config.train, min_owners=experiment.config.data.owners),
    )
    if options["sessions"]:
        from simulations.faults.session_faults import CASES
        from simulations.faults.testbed import FaultTestbed

        moments = [float(m) for m in options["session-moments"]]
        for name in options["sessions"]:
            pick(CASES, name, "options.sessions")
        for moment in moments:
            check(0 < moment < 1, "options.session-moments", moment, "in (0, 1)")
        testbed = FaultTestbed(config, folder.path / "sessions")
        for name in options["sessions"]:
            yield from CASES[name](testbed, name, moments)
    if options["processes"]:
        from simulations.faults.process_faults import cases

        yield from cases(config, options, folder.path / "processes")
