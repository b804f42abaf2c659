"""The kind ``offsite-sweep``: what alpha and beta do to the emulator and to the plug-in.

ScaleOT's figures 3 and 4 (arXiv 2412.09812): alpha, the share of blocks outside A that harmonizers
replace; and beta, the rank reduction, of the attention projections (``mhsa``, the method's choice),
of the FFN (``ffn``) and of ``both``; ``mhsa-outputs`` keeps the projections' outputs on public text
closest instead of their weights.  Beta is swept without harmonizers unless ``alpha`` says
otherwise, so that what a curve shows is rank alone.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from rich.console import Console

from fedsplit.emulators.compressors.scaleot import ScaleOT
from fedsplit.emulators.planning.plan import check_fraction
from fedsplit.registry import pick
from simulations.core.cells import CellStore, Row, run_cells
from simulations.core.plots import draw_if_possible
from simulations.core.run_folder import RunFolder
from simulations.core.settings import Experiment, read_options
from simulations.offsite.plots import sweep_plot
from simulations.offsite.setting import COMMON, PREPARED, OffsiteSetting, perplexity_of

OPTIONS: dict[str, Any] = {
    **COMMON,
    "alpha": 0.0,
    "alphas": [0.0, 0.25, 0.5, 0.75, 1.0],
    "betas": [0.2, 0.4, 0.6, 0.8, 1.0],
    "targets": ["mhsa", "ffn", "both"],
}
# target -> compress the attention, the FFN, what stays closest
TARGETS: dict[str, tuple[bool, bool, str]] = {
    "mhsa": (True, False, "weights"),
    "ffn": (False, True, "weights"),
    "both": (True, True, "weights"),
    "mhsa-outputs": (True, False, "outputs"),
}
LOSSES = ("full_zero_shot", "emulator_zero_shot", "emulator_ft", "plug_in")
PLOT = "offsite-sweep.png"


def run(experiment: Experiment, folder: RunFolder, console: Console) -> None:
    """Carry out the sweep; finished cells are kept if it is killed."""
    options = read_options(experiment.options, OPTIONS)
    for value in (*options["alphas"], *options["betas"]):
        check_fraction("options.alphas, options.betas", value)
    points = [("alpha", "", float(v)) for v in options["alphas"]]
    for target in options["targets"]:
        pick(TARGETS, target, "target")
        points += [("beta", target, float(v)) for v in options["betas"]]
    names = ("knob", "target", "value", "seed")
    seeds = range(options["seeds"])
    keys = [dict(zip(names, (*point, seed), strict=True)) for seed in seeds for point in points]
    selecting = ("seeds", "alphas", "betas", "targets", PREPARED)
    store = CellStore.open(folder, experiment.config, options, selecting)
    setting = OffsiteSetting(
        experiment.config, store.options, folder.path, store, options[PREPARED]
    )
    rows = run_cells(experiment, folder, console, store, keys, partial(cell, setting))
    draw_if_possible(console, folder.path / PLOT, sweep_plot, rows)


def cell(setting: OffsiteSetting, knob: str, target: str, value: float, seed: int) -> list[Row]:
    """Return the row of one emulator."""
    attention, ffn, truncation = TARGETS[target or "mhsa"]
    asked = ScaleOT(
        n_adapters=setting.options["adapters"],
        alpha=value if knob == "alpha" else setting.options["alpha"],
        beta=value if knob == "beta" else 0.0,
        attention=attention,
        ffn=ffn,
        truncation=truncation,
        rank_by=setting.options["rank-by"],
    )
    made, importance, _ = setting.settled(seed, asked)
    row = setting.trial(seed, made, importance)
    return [
        {
            "knob": knob,
            "target": target,
            "value": value,
            "seed": seed,
            **{name: perplexity_of(getattr(row, name)) for name in LOSSES},
            "emulator_params": row.emulator_params,
            "adapters": ",".join(map(str, row.adapters)),
        }
    ]
