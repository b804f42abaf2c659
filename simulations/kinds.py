"""What kinds of experiment there are."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from rich.console import Console

from simulations.run_folder import RunFolder
from simulations.settings import Experiment

Kind = Callable[[Experiment, RunFolder, Console], None]


def _kind(module: str) -> Kind:
    """Return ``run`` of a module of this package, which is loaded when it is needed."""

    def run(experiment: Experiment, folder: RunFolder, console: Console) -> None:
        importlib.import_module(f"simulations.{module}").run(experiment, folder, console)

    return run


# kind -> function that carries out one experiment and records its results in the folder
KINDS: dict[str, Kind] = {
    "split": _kind("split_experiment"),
    "sap-depth": _kind("depth_experiment"),
    "attributes": _kind("attributes_experiment"),
    "label-leakage": _kind("label_leakage_experiment"),
    "lineage-table": _kind("lineage_table_experiment"),
    "lineage-evasion": _kind("lineage_evasion_experiment"),
    "lineage-gate": _kind("lineage_gate_experiment"),
    "offsite-extraction": _kind("extraction_experiment"),
    "offsite-sweep": _kind("offsite_sweep_experiment"),
    "offsite-table": _kind("offsite_experiment"),
    "offsite-peft": _kind("offsite_peft_experiment"),
    "faults": _kind("faults_experiment"),
    "sweep": _kind("sweep"),
}
