"""The kind ``offsite-table``: what each way to make an emulator is worth, on one text and schedule.

Offsite-Tuning (arXiv 2302.04870) and ScaleOT (arXiv 2412.09812), their tables' columns.

| method | emulator |
| --- | --- |
| ``ot`` | ends are A, half of the other blocks kept at even distances |
| ``ot-kd`` | the same, the kept blocks distilled |
| ``crash`` | the same number of blocks, shared over clusters |
| ``gradot`` | ends are A, ``beta-gradot`` of attention parameters and FFN channels removed |
| ``scaleot`` | A by importance, ``alpha`` of the others replaced by settled harmonizers |
| ``scaleot-src`` | and the attention of what remains compressed by ``beta``, as the paper has it |
| ``scaleot-src-outputs`` | the same, keeping the projections' outputs closest instead of weights |
| ``ot-large`` | ``ot`` keeping as many blocks as ``scaleot``: equal size |
| ``ot-kd-large`` | ``ot-kd`` likewise |
| ``gradot-placed`` | ``gradot`` with the A of ``scaleot`` |
| ``withholding`` | noise on the head, ``offsite.margin`` nats; A: ``offsite.positions``, or ends |
| ``quantised`` | the A of ``scaleot``; the matrices of all other blocks in 4 bits |
| ``scaleot-half`` | ``scaleot`` with alpha = 0.5: the size of ``ot`` |
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from statistics import geometric_mean
from typing import Any

from rich.console import Console
from rich.table import Table

from fedsplit.emulators import Compressor, make_compressor
from fedsplit.emulators.compressors.scaleot import ScaleOT
from fedsplit.emulators.importance.files import Importance
from fedsplit.errors import check
from fedsplit.models.anatomy import probe
from fedsplit.registry import pick
from simulations.core.cells import CellStore, Row, product, run_cells
from simulations.core.plots import draw_if_possible
from simulations.core.run_folder import RunFolder
from simulations.core.settings import Experiment, read_options
from simulations.core.tables import grouped, make_table, mean
from simulations.offsite.plots import importance_plot, table_plot
from simulations.offsite.setting import COMMON, PREPARED, OffsiteSetting, perplexity_of

OPTIONS: dict[str, Any] = {
    **COMMON,
    "methods": ["ot", "ot-kd", "crash", "gradot", "scaleot", "scaleot-src"],
    "distil-steps": 400,
    "beta-gradot": 0.5,
    "full": True,
}
# Options that choose rows and change none.
SELECTING = ("methods", "seeds", "full", PREPARED)
LOSSES = ("full_zero_shot", "emulator_zero_shot", "emulator_ft", "plug_in", "adapters_in_full")
PLOT = "offsite-table.png"
SCORES_PLOT = "offsite-importance.png"


def run(experiment: Experiment, folder: RunFolder, console: Console) -> None:
    """Carry out the experiment; finished cells are kept if it is killed."""
    options = read_options(experiment.options, OPTIONS)
    for method in options["methods"]:
        pick(METHODS, method, "method")
    store = CellStore.open(folder, experiment.config, options, SELECTING)
    setting = OffsiteSetting(
        experiment.config, store.options, folder.path, store, options[PREPARED]
    )
    rank_by = options["rank-by"]

    def recorded(rows: list[Row]) -> dict[str, Any]:
        """Add what does not depend on the method: the tuned base, and the blocks' importance."""
        seeds = dict.fromkeys(row["seed"] for row in rows)
        full = {s: perplexity_of(setting.full_ft(s)) if options["full"] else None for s in seeds}
        ranked = dict.fromkeys(r["seed"] for r in rows if r["method"].startswith("scaleot"))
        return {
            "rows": [{**row, "full_ft": full[row["seed"]]} for row in rows],
            "importance": {
                str(s): list(getattr(setting.importance(s)[0], rank_by)) for s in ranked
            },
        }

    keys = product(seed=range(options["seeds"]), method=options["methods"])
    make = partial(cell, setting)
    found = recorded(run_cells(experiment, folder, console, store, keys, make, recorded))
    rows, scores = found["rows"], found["importance"]
    console.print(table(rows))
    draw_if_possible(console, folder.path / PLOT, table_plot, rows)
    if scores:
        draw_if_possible(console, folder.path / SCORES_PLOT, importance_plot, scores, rank_by)


def cell(setting: OffsiteSetting, method: str, seed: int) -> list[Row]:
    """Return the row of one method and seed."""
    made, importance, ready_s = METHODS[method](setting, seed)
    row = setting.trial(seed, made, importance)
    bound = setting.bound(seed, row.adapters)
    nats = {name: getattr(row, name) for name in LOSSES} | {"adapters_in_full": bound}
    return [
        {
            "data": setting.data,
            "method": method,
            "seed": seed,
            **{name: perplexity_of(value) for name, value in nats.items()},
            "closed": (row.full_zero_shot - row.plug_in) / (row.full_zero_shot - bound),
            "model_privacy_nats": row.emulator_ft - row.plug_in,
            "emulator_params": row.emulator_params,
            "build_s": row.build_s + ready_s,
            "trained_params": row.trained_params,
            "adapters": ",".join(map(str, row.adapters)),
            "held_out_tokens": setting.private[1].targets(),
            "zero_shot_check": perplexity_of(setting.measured(setting.loaded.model)),
        }
    ]


Made = tuple[Compressor, Importance | None, float]


def ends_are_a(setting: OffsiteSetting, large: bool = False) -> tuple[tuple[int, ...], int]:
    """Return Offsite-Tuning's choice of A, the first and last blocks, and how many others are kept.

    Half of the others; if ``large`` as many as ScaleOT keeps.
    """
    layers = probe(setting.loaded.model).num_layers
    count = setting.options["adapters"]
    half = max(1, count // 2)
    adapters = tuple(sorted({*range(half), *range(layers - (count - half), layers)}))
    check(len(adapters) < layers, "options.adapters", count, f"< {layers} blocks")
    rest = layers - len(adapters)
    replaced = math.floor((setting.options["alpha"] if large else 0.5) * rest + 0.5)
    return adapters, max(1, rest - replaced)


def _ot(setting: OffsiteSetting, seed: int, large: bool = False, distil: bool = False) -> Made:
    (adapters, kept), o = ends_are_a(setting, large), setting.options
    how = {"distil_steps": o["distil-steps"], "bf16": o["bf16"], "seed": seed}
    more: dict[str, Any] = how if distil else {}
    return make_compressor("layerdrop", adapters=adapters, keep=kept, **more), None, 0.0


def _crash(setting: OffsiteSetting, seed: int) -> Made:
    adapters, kept = ends_are_a(setting)
    return make_compressor("crash", adapters=adapters, clusters=kept), None, 0.0


def _gradot(setting: OffsiteSetting, seed: int) -> Made:
    return _gradot_of(setting, ends_are_a(setting)[0]), None, 0.0


def _gradot_of(setting: OffsiteSetting, adapters: tuple[int, ...]) -> Compressor:
    share = setting.options["beta-gradot"]
    return make_compressor("gradot", adapters=adapters, attention=share, ffn=share)


def _placed(setting: OffsiteSetting, seed: int) -> tuple[tuple[int, ...], float]:
    """Return the A that ScaleOT chooses, and the seconds of the importance run."""
    importance, seconds = setting.importance(seed)
    placed = ScaleOT(n_adapters=setting.options["adapters"], rank_by=setting.options["rank-by"])
    return placed.plan(setting.loaded.model, setting.material(importance)).adapters, seconds


def _gradot_placed(setting: OffsiteSetting, seed: int) -> Made:
    adapters, seconds = _placed(setting, seed)
    return _gradot_of(setting, adapters), None, seconds


def _quantised(setting: OffsiteSetting, seed: int) -> Made:
    adapters, seconds = _placed(setting, seed)
    return make_compressor("quantised", adapters=adapters, bits=4), None, seconds


def _withholding(setting: OffsiteSetting, seed: int) -> Made:
    offsite = setting.config.offsite
    adapters = offsite.chosen or ends_are_a(setting)[0]
    how: dict[str, Any] = {"margin": offsite.margin, "beta": offsite.beta, "secret": seed}
    how["truncation"] = offsite.truncation
    return make_compressor("withholding", adapters=adapters, **how), None, 0.0


def _scaleot(setting: OffsiteSetting, seed: int, **asked: Any) -> Made:
    o = setting.options
    how: dict[str, Any] = {"alpha": o["alpha"], "rank_by": o["rank-by"], **asked}
    return setting.settled(seed, ScaleOT(o["adapters"], **how))


def _src(setting: OffsiteSetting, seed: int, truncation: str) -> Made:
    return _scaleot(setting, seed, beta=setting.options["beta"], truncation=truncation)


METHODS: dict[str, Callable[[OffsiteSetting, int], Made]] = {
    "ot": _ot,
    "ot-kd": partial(_ot, distil=True),
    "crash": _crash,
    "gradot": _gradot,
    "scaleot": _scaleot,
    "scaleot-src": partial(_src, truncation="weights"),
    "scaleot-src-outputs": partial(_src, truncation="outputs"),
    "ot-large": partial(_ot, large=True),
    "ot-kd-large": partial(_ot, large=True, distil=True),
    "gradot-placed": _gradot_placed,
    "withholding": _withholding,
    "quantised": _quantised,
    "scaleot-half": partial(_scaleot, alpha=0.5),
}


# What a column of the printed table is called; all are perplexities.
HEADS = {
    "full_zero_shot": "zero- shot",
    "full_ft": "full tuned",
    "emulator_zero_shot": "emu- lator",
    "emulator_ft": "its tuned",
    "plug_in": "plug- in",
    "adapters_in_full": "A in full",
}


def table(rows: list[Row]) -> Table:
    """Return the paper's columns as means over seeds; of perplexities those in nats."""

    def values(mine: list[Row], name: str) -> list[float]:
        return [float(row[name]) for row in mine if row.get(name) is not None] or [math.nan]

    return make_table(
        ("method", *HEADS.values(), "closed %", "size M", "build s"),
        (
            (
                method,
                *(f"{geometric_mean(values(mine, name)):#.4g}" for name in HEADS),
                f"{100 * mean(mine, 'closed'):.1f}",
                f"{mean(mine, 'emulator_params') / 1e6:.2f}",
                f"{mean(mine, 'build_s'):.0f}",
            )
            for (method,), mine in grouped(rows, "method").items()
        ),
        title="held-out perplexity, means over seeds (in nats)",
        narrow=True,
    )
