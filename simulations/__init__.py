"""The experimenter's side: runs on simulated owners, baselines, attacks, benchmarks, reports.

The only importer of ray, and never part of the Flower app bundle.  ``python -m simulations list``
names the experiments; a kind of experiment is one file, and one row of ``KINDS``; a benchmark one
file, and one row of ``BENCHMARKS``.  Names are resolved on first use.

| folder | what it holds |
| --- | --- |
| ``core`` | settings, run folders, finished cells, tables and pictures, the page of a run |
| ``runtime`` | Flower's processes: simulated, deployed on one machine, or all in this process |
| ``split`` | split tuning: federated runs, their centralised twin, attacks on what left |
| ``offsite`` | offsite tuning: emulators, adapters, extraction |
| ``lineage`` | fingerprints and the lineage gate |
| ``sweep`` | many runs over axes of settings and seeds |
| ``bench`` | speed and memory, as ratios within one run |
| ``faults`` | killed processes, broken networks, moved clocks |
| ``fuzz`` | damaged input for every parser |

Examples:
    >>> from simulations import KINDS, load_experiment
    >>> experiment = load_experiment("demo", ["train.rounds=1"])
    >>> experiment.config.train.rounds, experiment.kind in KINDS
    (1, True)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedsplit.registry import lazy

if TYPE_CHECKING:
    from simulations.core.kinds import KINDS
    from simulations.core.run_folder import RunFolder, read_results
    from simulations.core.settings import Experiment, load_experiment, names

__all__ = ["KINDS", "Experiment", "RunFolder", "load_experiment", "names", "read_results"]

__getattr__ = lazy(
    __name__,
    {
        "core.settings": ("Experiment", "load_experiment", "names"),
        "core.kinds": ("KINDS",),
        "core.run_folder": ("RunFolder", "read_results"),
    },
)
