"""The kind ``offsite-table``: what each way to make an emulator is worth, on one text and schedule.

Offsite-Tuning (arXiv 2302.04870) and ScaleOT (arXiv 2412.09812), their tables' columns.

| method | emulator |
| --- | --- |
| ``ot`` | ends are A, half of the other blocks kept at even distances |
| ``ot-kd`` | the same, the kept blocks distilled |
| ``crash`` | the same number of blocks, shared over clusters |
| ``gradot`` | ends are A, ``beta-gradot`` of attention parameters and FFN channels removed |
| ``scaleot`` | A by importance, ``alpha`` of the others replaced by settled harmonizers |
| ``scaleot-src`` | and the attention of what remains compressed by ``beta`` |
| ``ot-large`` | ``ot`` keeping as many blocks as ``scaleot``: equal size |
| ``ot-kd-large`` | ``ot-kd`` likewise |
| ``gradot-placed`` | ``gradot`` with the A of ``scaleot`` |
| ``scaleot-half`` | ``scaleot`` with alpha = 0.5: the size of ``ot`` |
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from statistics import fmean, geometric_mean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fedsplit.emulators import Compressor, make_compressor
from fedsplit.emulators.compressors.scaleot import ScaleOT
from fedsplit.emulators.importance.files import Importance
from fedsplit.emulators.planning.trial import trial
from fedsplit.errors import ConfigError
from fedsplit.models.anatomy import probe
from fedsplit.registry import pick
from simulations.core.cells import Cells, Row
from simulations.core.progress import RunProgress
from simulations.core.run_folder import RunFolder
from simulations.core.settings import Experiment
from simulations.offsite.setting import COMMON, World, options_of, perplexity_of

OPTIONS: dict[str, Any] = {
    **COMMON,
    "methods": ["ot", "ot-kd", "crash", "gradot", "scaleot", "scaleot-src"],
    "distil-steps": 400,
    "beta-gradot": 0.5,
    "full": True,
}
LOSSES = ("full_zero_shot", "emulator_zero_shot", "emulator_ft", "plug_in", "adapters_in_full")
PLOT = "offsite-table.png"
SCORES_PLOT = "offsite-importance.png"


def run(experiment: Experiment, folder: RunFolder, console: Console) -> None:
    """Carry out the experiment; finished cells are kept if it is killed.

    Raises:
        FedsplitError: whatever failed, named.
    """
    options = options_of(experiment.options, OPTIONS)
    for method in options["methods"]:
        pick(METHODS, method, "method")
    config = experiment.config
    flat = config.to_flat()
    folder.write_config({**flat, "options": options})
    # The choice of rows and the number of seeds change no row.
    same = {k: v for k, v in options.items() if k not in ("methods", "seeds", "full")}
    cells = Cells(folder.path / "cells.jsonl", {**flat, **same})
    world = World(config, same, folder.path, cells)
    rows: list[Row] = []
    scores: dict[str, list[float]] = {}
    done, whole = 0, len(options["methods"]) * int(options["seeds"])
    with RunProgress(console) as progress:
        progress.stage("emulators")
        for seed in range(int(options["seeds"])):
            full = perplexity_of(world.full_ft(seed)) if options["full"] else None
            for method in options["methods"]:
                identity = {"method": method, "seed": seed}
                made = cells.rows(identity, partial(cell, world, method, seed))
                rows += [{**row, "full_ft": full} for row in made]
                if method.startswith("scaleot"):
                    importance = world.importance(seed)[0]
                    scores[str(seed)] = list(getattr(importance, str(options["rank-by"])))
                folder.record(about=experiment.about, rows=rows, importance=scores)
                done += 1
                progress.update(done / whole, f"{method}, seed {seed}")
    console.print(table(rows))
    draw(folder, rows, scores, console, str(options["rank-by"]))


def cell(world: World, method: str, seed: int) -> list[Row]:
    """Return the row of one method and seed."""
    train, held_out, _ = world.tokens
    model = world.loaded.model
    made, importance, ready_s = METHODS[method](world, seed)
    row, _ = trial(
        model,
        made,
        world.material(importance),
        train,
        held_out,
        world.tuning(seed),
        full_zero_shot=world.full_zero_shot(),
        bound=math.nan,
    )
    bound = world.bound(seed, row.adapters)
    nats = {name: getattr(row, name) for name in LOSSES} | {"adapters_in_full": bound}
    out: Row = {"method": method, "seed": seed}
    out |= {name: perplexity_of(value) for name, value in nats.items()}
    return [
        out
        | {
            "closed": (row.full_zero_shot - row.plug_in) / (row.full_zero_shot - bound),
            "model_privacy_nats": row.emulator_ft - row.plug_in,
            "emulator_params": row.emulator_params,
            "build_s": row.build_s + ready_s,
            "trained_params": row.trained_params,
            "adapters": ",".join(map(str, row.adapters)),
            "held_out_tokens": held_out.numel(),
            "zero_shot_check": perplexity_of(world.measured(model)),
        }
    ]


def draw(
    folder: RunFolder,
    rows: list[Row],
    scores: dict[str, list[float]],
    console: Console,
    rank_by: str,
) -> None:
    """Leave the pictures in the run's folder, where matplotlib is installed."""
    from simulations.offsite.plots import drawn, importance_plot, table_plot

    drawn(console, lambda: table_plot(folder.path / PLOT, rows))
    if scores:
        drawn(console, lambda: importance_plot(folder.path / SCORES_PLOT, scores, rank_by))


Made = tuple[Compressor, Importance | None, float]


def _ends(world: World, large: bool = False) -> dict[str, Any]:
    """Offsite-Tuning's choice: the first and last blocks are A, half of the others are kept."""
    layers = probe(world.loaded.model).num_layers
    count = int(world.options["adapters"])
    half = max(1, count // 2)
    adapters = tuple(sorted({*range(half), *range(layers - (count - half), layers)}))
    if len(adapters) >= layers:
        raise ConfigError(f"options.adapters={count}: must be < {layers} blocks")
    rest = layers - len(adapters)
    replaced = math.floor((float(world.options["alpha"]) if large else 0.5) * rest + 0.5)
    return {"adapters": adapters, "rest": max(1, rest - replaced)}


def _ot(world: World, seed: int, large: bool = False) -> Made:
    at = _ends(world, large)
    return make_compressor("layerdrop", adapters=at["adapters"], keep=at["rest"]), None, 0.0


def _ot_kd(world: World, seed: int, large: bool = False) -> Made:
    at = _ends(world, large)
    made = make_compressor(
        "layerdrop",
        adapters=at["adapters"],
        keep=at["rest"],
        distil_steps=int(world.options["distil-steps"]),
        bf16=bool(world.options["bf16"]),
        seed=seed,
    )
    return made, None, 0.0


def _crash(world: World, seed: int) -> Made:
    at = _ends(world)
    return make_compressor("crash", adapters=at["adapters"], clusters=at["rest"]), None, 0.0


def _gradot(world: World, seed: int) -> Made:
    at, share = _ends(world), float(world.options["beta-gradot"])
    return make_compressor("gradot", adapters=at["adapters"], attention=share, ffn=share), None, 0.0


def _gradot_placed(world: World, seed: int) -> Made:
    importance, seconds = world.importance(seed)
    placed = ScaleOT(n_adapters=int(world.options["adapters"]), rank_by=world.options["rank-by"])
    adapters = placed.plan(world.loaded.model, world.material(importance)).adapters
    share = float(world.options["beta-gradot"])
    made = make_compressor("gradot", adapters=adapters, attention=share, ffn=share)
    return made, None, seconds


def _scaleot(world: World, seed: int, alpha: float = -1.0, beta: float = 0.0) -> Made:
    o = world.options
    made = ScaleOT(
        n_adapters=int(o["adapters"]),
        alpha=float(o["alpha"]) if alpha < 0 else alpha,
        beta=beta,
        rank_by=str(o["rank-by"]),
    )
    return world.settled(seed, made)


def _scaleot_src(world: World, seed: int) -> Made:
    return _scaleot(world, seed, beta=float(world.options["beta"]))


METHODS: dict[str, Callable[[World, int], Made]] = {
    "ot": _ot,
    "ot-kd": _ot_kd,
    "crash": _crash,
    "gradot": _gradot,
    "scaleot": _scaleot,
    "scaleot-src": _scaleot_src,
    "ot-large": partial(_ot, large=True),
    "ot-kd-large": partial(_ot_kd, large=True),
    "gradot-placed": _gradot_placed,
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
    title = "held-out perplexity, means over seeds (in nats)"
    shown = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    shown.add_column("method", no_wrap=True)
    for name in (*HEADS.values(), "closed %", "size M", "build s"):
        shown.add_column(name, justify="right", min_width=max(map(len, name.split())))
    for method in dict.fromkeys(str(row["method"]) for row in rows):
        mine = [row for row in rows if row["method"] == method]

        def values(name: str, mine: list[Row] = mine) -> list[float]:
            return [float(row[name]) for row in mine if row.get(name) is not None] or [math.nan]

        shown.add_row(
            method,
            *(f"{geometric_mean(values(name)):#.4g}" for name in HEADS),
            f"{100 * fmean(values('closed')):.1f}",
            f"{fmean(values('emulator_params')) / 1e6:.2f}",
            f"{fmean(values('build_s')):.0f}",
        )
    return shown


__all__ = ["METHODS", "OPTIONS", "World", "cell", "run", "table"]
