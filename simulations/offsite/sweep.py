"""The kind ``offsite-sweep``: what alpha and beta do to the emulator and to the plug-in.

ScaleOT's figures 3 and 4 (arXiv 2412.09812): alpha, the share of blocks outside A that harmonizers
replace; and beta, the rank reduction, of the attention projections (``mhsa``, the method's choice),
of the FFN (``ffn``) and of ``both``.  Beta is swept without harmonizers unless ``alpha`` says
otherwise, so that what a curve shows is rank alone.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from rich.console import Console

from fedsplit.emulators.compressors.scaleot import ScaleOT
from fedsplit.emulators.planning.plan import check_fraction
from fedsplit.emulators.planning.trial import trial
from fedsplit.registry import pick
from simulations.core.cells import Cells, Row
from simulations.core.progress import RunProgress
from simulations.core.run_folder import RunFolder
from simulations.core.settings import Experiment
from simulations.offsite.setting import COMMON, World, options_of, perplexity_of

OPTIONS: dict[str, Any] = {
    **COMMON,
    "alpha": 0.0,
    "alphas": [0.0, 0.25, 0.5, 0.75, 1.0],
    "betas": [0.2, 0.4, 0.6, 0.8, 1.0],
    "targets": ["mhsa", "ffn", "both"],
}
# target -> compress the attention, the FFN
TARGETS: dict[str, tuple[bool, bool]] = {
    "mhsa": (True, False),
    "ffn": (False, True),
    "both": (True, True),
}
PLOT = "offsite-sweep.png"


def run(experiment: Experiment, folder: RunFolder, console: Console) -> None:
    """Carry out the sweep; finished cells are kept if it is killed.

    Raises:
        FedsplitError: whatever failed, named.
    """
    from simulations.offsite.plots import drawn, sweep_plot

    options = options_of(experiment.options, OPTIONS)
    for value in (*options["alphas"], *options["betas"]):
        check_fraction("options.alphas, options.betas", value)
    points = [("alpha", "", float(v)) for v in options["alphas"]]
    for target in options["targets"]:
        pick(TARGETS, target, "target")
        points += [("beta", target, float(v)) for v in options["betas"]]
    config = experiment.config
    flat = config.to_flat()
    folder.write_config({**flat, "options": options})
    # Which points are asked for changes none of them.
    same = {k: v for k, v in options.items() if k not in ("seeds", "alphas", "betas", "targets")}
    cells = Cells(folder.path / "cells.jsonl", {**flat, **same})
    world = World(config, same, folder.path, cells)
    rows: list[Row] = []
    done, whole = 0, len(points) * int(options["seeds"])
    with RunProgress(console) as progress:
        progress.stage("emulators")
        for seed in range(int(options["seeds"])):
            for knob, target, value in points:
                identity = {"knob": knob, "target": target, "value": value, "seed": seed}
                rows += cells.rows(identity, partial(cell, world, knob, target, value, seed))
                folder.record(about=experiment.about, rows=rows)
                done += 1
                progress.update(done / whole, f"{knob} {target} {value:g}, seed {seed}")
    drawn(console, lambda: sweep_plot(folder.path / PLOT, rows))


def cell(world: World, knob: str, target: str, value: float, seed: int) -> list[Row]:
    """Return the row of one emulator."""
    alpha = value if knob == "alpha" else float(world.options["alpha"])
    beta = value if knob == "beta" else 0.0
    attention, ffn = TARGETS[target or "mhsa"]
    asked = ScaleOT(
        n_adapters=int(world.options["adapters"]),
        alpha=alpha,
        beta=beta,
        attention=attention,
        ffn=ffn,
        rank_by=str(world.options["rank-by"]),
    )
    made, importance, _ = world.settled(seed, asked)
    train, held_out, _ = world.tokens
    row, _ = trial(
        world.loaded.model,
        made,
        world.material(importance),
        train,
        held_out,
        world.tuning(seed),
        full_zero_shot=world.full_zero_shot(),
        bound=math.nan,
    )
    return [
        {
            "knob": knob,
            "target": target,
            "value": value,
            "seed": seed,
            "full_zero_shot": perplexity_of(row.full_zero_shot),
            "emulator_zero_shot": perplexity_of(row.emulator_zero_shot),
            "emulator_ft": perplexity_of(row.emulator_ft),
            "plug_in": perplexity_of(row.plug_in),
            "emulator_params": row.emulator_params,
            "adapters": ",".join(map(str, row.adapters)),
        }
    ]
