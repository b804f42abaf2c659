"""The kind ``adversary``: a lying server against the owner's real code, case by case.

Every row has ``read`` (the share of tokens, labels, texts or facts that the server read),
``allowance`` (guessing, or what the policy's floor allows) and ``before``: what the first version
let it read (:mod:`simulations.adversary.reference`).
"""

from __future__ import annotations

import time
from typing import Any

import torch
from rich.console import Console

from simulations.adversary.cases.table import CASES, play
from simulations.adversary.reference import BEFORE
from simulations.core.cells import CellStore, Row, product, run_cells
from simulations.core.run_folder import RunFolder
from simulations.core.settings import Experiment, read_options
from simulations.core.tables import make_table

OPTIONS: dict[str, Any] = {"cases": list(CASES), "quick": False, "real": True}


def run(experiment: Experiment, folder: RunFolder, console: Console) -> None:
    """Carry out the experiment; finished cases are kept if it is killed.

    Raises:
        ConfigError: an unknown option or case.
    """
    options = read_options(experiment.options, OPTIONS)
    store = CellStore.open(folder, experiment.config, options, ("cases",))
    threads = torch.get_num_threads()

    def make(case: str) -> list[Row]:
        began = time.perf_counter()
        found = play(case, quick=options["quick"], real=options["real"])
        seconds = (time.perf_counter() - began) / max(1, len(found))
        return [
            {**row.to_dict(), "before": BEFORE.get((row.case, row.variant)), "seconds": seconds}
            for row in found
        ]

    try:
        keys = product(case=options["cases"])
        rows = run_cells(experiment, folder, console, store, keys, make)
    finally:
        torch.set_num_threads(threads)  # owners keep to the threads that a server gave them
    heads = ("case", "variant", "of", "read", "allowance", "before", "")
    lines = (
        (
            row["case"],
            row["variant"],
            f"{row['targets']} {row['unit']}",
            *(None if row[c] is None else f"{100 * row[c]:.1f} %" for c in heads[3:6]),
            "" if row["ok"] else "too much",
        )
        for row in rows
    )
    console.print(make_table(heads, lines, title="What a lying server reads", left=3))
