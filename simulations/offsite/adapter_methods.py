"""The kind ``offsite-peft``: what is trained inside A, against the whole of A, on one emulator.

One emulator a seed (the recipe of ``offsite-table``), the same batches for every method, each with
a rate of its own.  Centralised, for the reason that :mod:`simulations.offsite.setting` gives.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from fedsplit.emulators import Emulator
from fedsplit.emulators.build import tune_in_full, tune_inside
from fedsplit.emulators.planning.trial import tune
from fedsplit.models.adapters.methods import METHODS, MethodSettings
from fedsplit.registry import pick
from simulations.core.cells import CellStore, Row, product, run_cells
from simulations.core.run_folder import RunFolder
from simulations.core.settings import Experiment, read_options
from simulations.core.tables import grouped, make_table, mean
from simulations.offsite import emulator_table
from simulations.offsite.setting import PREPARED, OffsiteSetting, perplexity_of

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
    """Carry out the experiment; finished cells are kept if it is killed."""
    options = read_options(experiment.options, {**emulator_table.OPTIONS, **OPTIONS})
    for method in options["methods"]:
        pick(METHODS, method, "method")
    pick(emulator_table.METHODS, options["emulator"], "emulator")
    store = CellStore.open(folder, experiment.config, options, emulator_table.SELECTING)
    prepared = options[PREPARED]
    setting = PeftSetting(experiment.config, store.options, folder.path, store, prepared)
    keys = product(seed=range(options["seeds"]), method=options["methods"])
    rows = run_cells(
        experiment, folder, console, store, keys, setting.cell, lambda r: {"rows": compared(r)}
    )
    console.print(table(compared(rows)))


@dataclass
class PeftSetting(OffsiteSetting):
    """One emulator a seed, and what each method makes of it."""

    _built: tuple[int, Emulator, float] | None = None

    def emulator(self, seed: int) -> tuple[Emulator, float]:
        """Return the seed's emulator and its held-out loss before tuning; the last one is kept."""
        if self._built is None or self._built[0] != seed:
            made, importance, _ = emulator_table.METHODS[self.options["emulator"]](self, seed)
            emulator = made.build(self.loaded.model, self.material(importance))
            self._built = (seed, emulator, self.measured(emulator.model))
        return self._built[1], self._built[2]

    def cell(self, method: str, seed: int) -> list[Row]:
        """Return the row of one method and seed."""
        built, before = self.emulator(seed)
        model, o = self.loaded.model, self.options
        train, held_out = self.private
        zero_shot = self.full_zero_shot()
        settings = MethodSettings(method, o["rank"], o["lora-alpha"], o["width"], o["prefix"], seed)
        rate = o[f"lr-{method}"]
        tuning = replace(self.tuning(seed), lr=rate)
        emulator = copy.deepcopy(built)
        inside = tune_inside(emulator, settings)
        began = time.perf_counter()
        losses = tune(emulator.model, inside.parameters(), train, tuning)
        train_s = time.perf_counter() - began
        full = copy.deepcopy(model)
        plugged = tune_in_full(full, built.plan, settings)
        plugged.load(inside.state())
        plug_in = self.measured(full)
        return [
            {
                "method": method,
                "seed": seed,
                "full_zero_shot": perplexity_of(zero_shot),
                "emulator_zero_shot": perplexity_of(before),
                "emulator_ft": perplexity_of(self.measured(emulator.model)),
                "plug_in": perplexity_of(plug_in),
                "gain_nats": zero_shot - plug_in,
                "trained_params": inside.count(),
                "trained_share": inside.count() / sum(p.numel() for p in model.parameters()),
                "lr": rate,
                "last_loss": sum(losses[-10:]) / len(losses[-10:]),
                "train_s": train_s,
                "adapters": ",".join(map(str, built.plan.adapters)),
                "held_out_tokens": held_out.targets(),
            }
        ]


def compared(rows: list[Row]) -> list[Row]:
    """Return rows with each gain as a share of full adapters' gain of the same seed."""
    base = {row["seed"]: row["gain_nats"] for row in rows if row["method"] == BASE}
    found = []
    for row in rows:
        full = base.get(row["seed"])
        found.append(row if full is None else row | {"relative_gain": row["gain_nats"] / full})
    return found


def table(rows: list[Row]) -> Table:
    """Return means over seeds, and the worst seed's relative gain."""

    def shares(mine: list[Row]) -> list[float]:
        return [float(row.get("relative_gain", math.nan)) for row in mine]

    heads = ("lr", "trained", "emulator ft", "plug in", "gain (nats)", "of full", "worst seed")
    return make_table(
        ("method", *heads),
        (
            (
                method,
                f"{mean(mine, 'lr'):.0e}",
                f"{100 * mean(mine, 'trained_share'):.2f} %",
                *(f"{mean(mine, name):.2f}" for name in ("emulator_ft", "plug_in")),
                f"{mean(mine, 'gain_nats'):.4f}",
                *(f"{100 * of(shares(mine)):.1f} %" for of in (fmean, min)),
            )
            for (method,), mine in grouped(rows, "method").items()
        ),
        title="trained inside A, means over seeds",
    )
