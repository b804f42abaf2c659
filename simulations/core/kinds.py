"""What kinds of experiment there are: a kind is one file with ``run``, and one row here.

``run(experiment, folder, console)`` checks the options, carries the experiment out, records what is
known in the folder as it comes (a killed run keeps it) and prints a table at the end.  It raises a
:class:`fedsplit.errors.FedsplitError` that names whatever failed.
"""

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
    "split": _kind("split.federated_run"),
    "task-parity": _kind("split.task_parity"),
    "sap-depth": _kind("split.inversion_by_depth"),
    "attributes": _kind("split.attribute_inference"),
    "instruct": _kind("split.instruct"),
    "label-leakage": _kind("split.label_leakage"),
    "lm-leakage": _kind("split.lm_leakage"),
    "lm-peers": _kind("peers.side_by_side"),
    "lm-frontier": _kind("split.lm_frontier"),
    "lineage-table": _kind("lineage.fingerprint_table"),
    "lineage-evasion": _kind("lineage.evasion"),
    "lineage-llm": _kind("lineage.large_model"),
    "lineage-gate": _kind("lineage.gate"),
    "offsite": _kind("offsite.federated_run"),
    "offsite-extraction": _kind("offsite.extraction"),
    "offsite-sweep": _kind("offsite.emulator_sweep"),
    "offsite-table": _kind("offsite.emulator_table"),
    "offsite-peft": _kind("offsite.adapter_methods"),
    "adversary": _kind("adversary.lying_server"),
    "faults": _kind("faults.fault_matrix"),
    "poison": _kind("poison.federations"),
    "sweep": _kind("sweep.run"),
}
