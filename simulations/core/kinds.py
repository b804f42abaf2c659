"""What kinds of experiment there are."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from rich.console import Console

from simulations.core.run_folder import RunFolder
from simulations.core.settings import Experiment

Kind = Callable[[Experiment, RunFolder, Console], None]


def _kind(module: str) -> Kind:
    """Return ``run`` of a module of this package, which is loaded when it is needed."""

    def run(experiment: Experiment, folder: RunFolder, console: Console) -> None:
        importlib.import_module(f"simulations.{module}").run(experiment, folder, console)

    return run


# kind -> function that carries out one experiment and records its results in the folder
KINDS: dict[str, Kind] = {
    "split": _kind("split.experiment"),
    "sap-depth": _kind("split.depth"),
    "attributes": _kind("split.attributes"),
    "label-leakage": _kind("split.label_leakage"),
    "lineage-table": _kind("lineage.table"),
    "lineage-evasion": _kind("lineage.evasion"),
    "lineage-gate": _kind("lineage.gate"),
    "offsite-extraction": _kind("offsite.extraction"),
    "offsite-sweep": _kind("offsite.sweep"),
    "offsite-table": _kind("offsite.table"),
    "offsite-peft": _kind("offsite.peft"),
    "faults": _kind("faults.fault_matrix"),
    "sweep": _kind("sweep.run"),
}
