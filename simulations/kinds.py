"""What kinds of experiment there are."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console

from simulations.run_folder import RunFolder
from simulations.settings import Experiment


def _split(experiment: Experiment, folder: RunFolder, console: Console) -> None:
    from simulations.split_experiment import run

    run(experiment, folder, console)


def _sweep(experiment: Experiment, folder: RunFolder, console: Console) -> None:
    from simulations.sweep import run

    run(experiment, folder, console)


def _lineage_table(experiment: Experiment, folder: RunFolder, console: Console) -> None:
    from simulations.lineage_table_experiment import run

    run(experiment, folder, console)


def _lineage_evasion(experiment: Experiment, folder: RunFolder, console: Console) -> None:
    from simulations.lineage_evasion_experiment import run

    run(experiment, folder, console)


def _sap_depth(experiment: Experiment, folder: RunFolder, console: Console) -> None:
    from simulations.depth_experiment import run

    run(experiment, folder, console)


def _attributes(experiment: Experiment, folder: RunFolder, console: Console) -> None:
    from simulations.attributes_experiment import run

    run(experiment, folder, console)


def _lineage_gate(experiment: Experiment, folder: RunFolder, console: Console) -> None:
    from simulations.lineage_gate_experiment import run

    run(experiment, folder, console)


def _label_leakage(experiment: Experiment, folder: RunFolder, console: Console) -> None:
    from simulations.label_leakage_experiment import run

    run(experiment, folder, console)


def _offsite_table(experiment: Experiment, folder: RunFolder, console: Console) -> None:
    from simulations.offsite_experiment import run

    run(experiment, folder, console)


# kind -> function that carries out one experiment and records its results in the folder
KINDS: dict[str, Callable[[Experiment, RunFolder, Console], None]] = {
    "split": _split,
    "sap-depth": _sap_depth,
    "attributes": _attributes,
    "label-leakage": _label_leakage,
    "lineage-table": _lineage_table,
    "lineage-evasion": _lineage_evasion,
    "lineage-gate": _lineage_gate,
    "offsite-table": _offsite_table,
    "sweep": _sweep,
}
