"""Seconds to an emulator: ScaleOT's importance run and settling, beside distillation; and its SVD.

Both ways start from the same base and public text in one process.  ScaleOT is built once; then
Offsite-Tuning's emulator with as many blocks is distilled with more and more steps, each time from
the start (its learning rate falls over the whole run), until its plug-in is as good as ScaleOT's
or the last number of steps is reached.  The ratio counts the seconds of the distillation that got
there; if none did, that of the longest one, as a lower bound.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from typer import Option

from fedsplit.emulators import Compressor, make_compressor
from fedsplit.emulators.compression.svd import truncate
from fedsplit.emulators.compressors.scaleot import ScaleOT
from fedsplit.emulators.importance.files import Importance
from fedsplit.errors import check
from fedsplit.seeding import torch_generator
from simulations.bench.figures import JsonPath, Overrides, publish
from simulations.core.settings import load_experiment, read_options
from simulations.core.tables import formatted, make_table
from simulations.offsite.emulator_table import OPTIONS, ends_are_a
from simulations.offsite.setting import PREPARED, OffsiteSetting, perplexity_of
from simulations.runtime.machine import machine

# What was made earlier has no seconds of now.
TIMED = {key: value for key, value in OPTIONS.items() if key != PREPARED}
SVD_METHODS = ("full", "eigen", "randomised")


def run(
    console: Console,
    json_path: JsonPath = None,
    set_: Overrides = None,
    *,
    steps: Annotated[
        Any, Option(help="of the distillations to try, rising; empty: the SVD alone", parser=str)
    ] = "100,200,400,800,1600",
    width: Annotated[int, Option(help="side of the matrix for the SVD; 0: none")] = 2048,
    rank: Annotated[int, Option(help="kept of it")] = 128,
    repeats: Annotated[int, Option(help="of each SVD; the fastest counts")] = 3,
) -> dict[str, Any]:
    """Measure seconds to ScaleOT's emulator beside distillation (offsite-table), and its SVD."""
    steps = [int(x) for x in steps.split(",") if x.strip()] if isinstance(steps, str) else steps
    rising = list(steps) == sorted(set(steps)) and all(number >= 1 for number in steps)
    check(rising, "steps", tuple(steps), "rising, >= 1")
    check(repeats >= 1, "repeats", repeats, ">= 1")
    check(width == 0 or 1 <= rank <= width, "rank", rank, f"in 1..{width}")
    figures: dict[str, Any] = {"machine": machine()}
    if steps:
        figures |= against_distillation(set_ or (), steps, console)
    if width:
        figures["svd"] = svd_rows(width, rank, repeats)
    return publish(console, json_path, figures, tables(figures))


def against_distillation(
    overrides: Sequence[str], steps: Sequence[int], console: Console
) -> dict[str, Any]:
    """Return ScaleOT's figures, a row per distillation, and the ratio of their seconds."""
    experiment = load_experiment("offsite-table", overrides)
    setting = OffsiteSetting(experiment.config, read_options(experiment.options, TIMED))
    o, seed = setting.options, 0
    _ = setting.public, setting.full_zero_shot()  # read and warm before anything is timed
    asked = ScaleOT(n_adapters=o["adapters"], alpha=o["alpha"], rank_by=o["rank-by"])
    importance_s = setting.importance(seed)[1]
    made, importance, seconds = setting.settled(seed, asked)
    ours = _measured(setting, made, importance, seconds)
    ours |= {"importance_s": importance_s, "settle_s": seconds - importance_s}
    console.print(f"scaleot: plug-in {ours['plug_in']:.2f} after {ours['seconds']:.1f} s")
    adapters, kept = ends_are_a(setting, large=True)
    rows: list[dict[str, Any]] = []
    for number in steps:
        how = {"distil_steps": number, "bf16": o["bf16"], "seed": seed}
        distilled = make_compressor("layerdrop", adapters=adapters, keep=kept, **how)
        rows.append({"steps": number} | _measured(setting, distilled, None, 0.0))
        console.print(
            f"distilled {number} steps: plug-in {rows[-1]['plug_in']:.2f} "
            f"after {rows[-1]['seconds']:.1f} s"
        )
        if rows[-1]["plug_in"] <= ours["plug_in"]:
            break
    return {
        "model": experiment.config.model.name,
        "tuning_steps": o["steps"],
        "tuning_batch": o["batch"],
        "full_zero_shot": perplexity_of(setting.full_zero_shot()),
        "scaleot": ours,
        "distillation": rows,
        "reached": rows[-1]["plug_in"] <= ours["plug_in"],
        "ratio": rows[-1]["seconds"] / ours["seconds"],
    }


def _measured(
    setting: OffsiteSetting, made: Compressor, importance: Importance | None, before_s: float
) -> dict[str, Any]:
    row = setting.trial(0, made, importance)
    return {
        "seconds": before_s + row.build_s,
        "plug_in": perplexity_of(row.plug_in),
        "emulator_ft": perplexity_of(row.emulator_ft),
        "emulator_zero_shot": perplexity_of(row.emulator_zero_shot),
        "emulator_params": row.emulator_params,
        "adapters": list(row.adapters),
    }


def slow_spectrum(width: int, seed: int = 0) -> Tensor:
    """Return a matrix (width, width) whose singular values fall as i^(-1/2): slowly, as trained
    projections' do, which is the hard case for a randomised SVD."""
    generator = torch_generator(seed, "bench.emulator", width)
    left, right = (
        torch.linalg.qr(torch.randn(width, width, generator=generator)).Q for _ in range(2)
    )
    values = torch.arange(1, width + 1, dtype=torch.float32).rsqrt()
    made: Tensor = left * values @ right
    return made


def svd_rows(width: int, rank: int, repeats: int) -> list[dict[str, Any]]:
    """Return seconds and relative error of each method, and its error over the full SVD's."""
    matrix = slow_spectrum(width)
    rows: list[dict[str, Any]] = []
    for method in SVD_METHODS:
        seconds, error = math.inf, math.nan
        for _ in range(repeats):
            began = time.perf_counter()
            error = truncate(matrix, rank, method).error
            seconds = min(seconds, time.perf_counter() - began)
        rows.append({"method": method, "seconds": seconds, "error": error})
    full = rows[0]
    return [
        {
            **row,
            "width": width,
            "rank": rank,
            "speedup": full["seconds"] / row["seconds"],
            "excess_error": row["error"] / full["error"] - 1 if full["error"] > 0 else 0.0,
        }
        for row in rows
    ]


def tables(figures: dict[str, Any]) -> Iterator[Table]:
    """Yield the tables."""
    if "scaleot" in figures:
        word = "" if figures["reached"] else "at least "
        named = [(f"distilled, {row['steps']} steps", row) for row in figures["distillation"]]
        shown = {"seconds": ".1f", "plug_in": ".2f", "emulator_ft": ".2f"}
        yield make_table(
            ("way", "seconds", "plug-in", "emulator tuned", "parameters"),
            (
                (name, *formatted(row, shown), f"{row['emulator_params'] / 1e6:.2f} M")
                for name, row in [("scaleot", figures["scaleot"]), *named]
            ),
            title=f"seconds to an emulator; plug-in after {figures['tuning_steps']} steps of "
            f"{figures['tuning_batch']}; distillation takes {word}{figures['ratio']:.2f} x "
            "ScaleOT's seconds",
        )
    if "svd" in figures:
        first = figures["svd"][0]
        shown = {"method": "", "seconds": ".2f", "speedup": ".1f", "error": ".5f"}
        yield make_table(
            ("SVD", "seconds", "times faster", "error", "over the full SVD's"),
            (
                (*formatted(row, shown), f"{100 * row['excess_error']:.3f} %")
                for row in figures["svd"]
            ),
            title=f"rank {first['rank']} of a {first['width']} square",
        )
