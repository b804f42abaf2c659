"""The kind ``offsite-peft``: what is trained inside A, against the whole of A, on one emulator.

One emulator a seed (the recipe of ``offsite-table``), the same batches for every method, each with
a rate of its own.  Centralised, for the reason that :mod:`simulations.offsite.setting` gives.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import replace
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from fedsplit.emulators import Emulator
from fedsplit.emulators.build import tune_in_full, tune_inside
from fedsplit.emulators.planning.trial import tune
from fedsplit.models.adapters.methods import METHODS, MethodSettings
from fedsplit.registry import pick
from simulations.core.cells import Cells, Row
from simulations.core.progress import RunProgress
from simulations.core.run_folder import RunFolder
from simulations.core.settings import Experiment
from simulations.offsite import table as offsite_experiment
from simulations.offsite.setting import World, options_of, perplexity_of

# Beside those of ``offsite-table``, whose emulators are built here.  Rates of the small methods are
# customary ones (about ten times full adapters' for LoRA), bottlenecks' of three tried on one seed.
OPTIONS: dict[str, Any] = {
    "methods": ["full", "lora", "bottleneck", "bitfit", "prefix"],
    "emulator": "scaleot",
    "rank": 16,
    "lora-alpha": 32.0,
    "width": 128,
    "prefix": 16,
    "lr-full": 3e-4,
    "lr-lora": 3e-3,
    "lr-bottleneck": 1e-2,
    "lr-bitfit": 1e-2,
    "lr-prefix": 1e-2,
}
BASE = "full"  # whose gain the others' is a share of


def run(experiment: Experiment, folder: RunFolder, console: Console) -> None:
    """Carry out the experiment; finished cells are kept if it is killed.

    Raises:
        FedsplitError: whatever failed, named.
    """
    options = options_of(experiment.options, {**offsite_experiment.OPTIONS, **OPTIONS})
    for method in options["methods"]:
        pick(METHODS, method, "method")
    pick(offsite_experiment.METHODS, options["emulator"], "emulator")
    config = experiment.config
    flat = config.to_flat()
    folder.write_config({**flat, "options": options})
    # More methods or seeds leave finished cells as they are.
    same = {k: v for k, v in options.items() if k not in ("methods", "seeds", "full")}
    cells = Cells(folder.path / "cells.jsonl", {**flat, **same})
    bench = Bench(World(config, same, folder.path, cells))
    rows: list[Row] = []
    done, whole = 0, len(options["methods"]) * int(options["seeds"])
    with RunProgress(console) as progress:
        progress.stage("methods")
        for seed in range(int(options["seeds"])):
            for method in options["methods"]:
                identity = {"method": method, "seed": seed}
                rows += cells.rows(identity, partial(bench.cell, method, seed))
                folder.record(about=experiment.about, rows=compared(rows))
                done += 1
                progress.update(done / whole, f"{method}, seed {seed}")
    console.print(table(compared(rows)))


class Bench:
    """One emulator a seed, and what each method makes of it.

    Args:
        world: model, texts, importance, options.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._built: tuple[int, Emulator, float] | None = None

    def emulator(self, seed: int) -> tuple[Emulator, float]:
        """Return the seed's emulator and its held-out loss before tuning; the last one is kept."""
        if self._built is None or self._built[0] != seed:
            name = str(self.world.options["emulator"])
            made, importance, _ = offsite_experiment.METHODS[name](self.world, seed)
            emulator = made.build(self.world.loaded.model, self.world.material(importance))
            self._built = (seed, emulator, self.world.measured(emulator.model))
        return self._built[1], self._built[2]

    def cell(self, method: str, seed: int) -> list[Row]:
        """Return the row of one method and seed."""
        built, before = self.emulator(seed)
        model, o = self.world.loaded.model, self.world.options
        train, held_out, _ = self.world.tokens
        zero_shot = self.world.full_zero_shot()
        settings = MethodSettings(
            method, int(o["rank"]), float(o["lora-alpha"]), int(o["width"]), int(o["prefix"]), seed
        )
        rate = float(o[f"lr-{method}"])
        tuning = replace(self.world.tuning(seed), lr=rate)
        emulator = copy.deepcopy(built)
        inside = tune_inside(emulator, settings)
        began = time.perf_counter()
        losses = tune(emulator.model, inside.parameters(), train, tuning)
        train_s = time.perf_counter() - began
        full = copy.deepcopy(model)
        plugged = tune_in_full(full, built.plan, settings)
        plugged.load(inside.state())
        plug_in = self.world.measured(full)
        return [
            {
                "method": method,
                "seed": seed,
                "full_zero_shot": perplexity_of(zero_shot),
                "emulator_zero_shot": perplexity_of(before),
                "emulator_ft": perplexity_of(self.world.measured(emulator.model)),
                "plug_in": perplexity_of(plug_in),
                "gain_nats": zero_shot - plug_in,
                "trained_params": inside.count(),
                "trained_share": inside.count() / sum(p.numel() for p in model.parameters()),
                "lr": rate,
                "last_loss": sum(losses[-10:]) / len(losses[-10:]),
                "train_s": train_s,
                "adapters": ",".join(map(str, built.plan.adapters)),
                "held_out_tokens": held_out.numel(),
            }
        ]


def compared(rows: list[Row]) -> list[Row]:
    """Return rows with each gain as a share of full adapters' gain of the same seed."""
    base = {row["seed"]: row["gain_nats"] for row in rows if row["method"] == BASE}
    return [
        row | {"relative_gain": row["gain_nats"] / base[row["seed"]]}
        if row["seed"] in base
        else row
        for row in rows
    ]


def table(rows: list[Row]) -> Table:
    """Return means over seeds, and the worst seed's relative gain."""
    shown = Table(title="trained inside A, means over seeds", title_justify="left")
    shown.add_column("method", no_wrap=True)
    for name in ("lr", "trained", "emulator ft", "plug in", "gain (nats)", "of full", "worst seed"):
        shown.add_column(name, justify="right")
    for method in dict.fromkeys(str(row["method"]) for row in rows):
        mine = [row for row in rows if row["method"] == method]
        share = [float(row.get("relative_gain", math.nan)) for row in mine]

        def mean(name: str, mine: list[Row] = mine) -> float:
            return sum(float(row[name]) for row in mine) / len(mine)

        shown.add_row(
            method,
            f"{mean('lr'):.0e}",
            f"{100 * mean('trained_share'):.2f} %",
            f"{mean('emulator_ft'):.2f}",
            f"{mean('plug_in'):.2f}",
            f"{mean('gain_nats'):.4f}",
            f"{100 * sum(share) / len(share):.1f} %",
            f"{100 * min(share):.1f} %",
        )
    return shown
