"""The kind ``lm-frontier``: what a language model learns under a protection, and what is read.

A cell tunes the base once over the owners' texts under one protection (:data:`PROTECTIONS`).
``gain_share`` is the share of the unprotected gain in nats per token, ``token_recovery`` and
``text_recovery`` what the strongest reader of gradients or weights has right, beside its guess, and
``joint_recovery`` what it has right with the representations as well.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedsplit.config import RunConfig
from fedsplit.emulators.planning.language import WAYS
from fedsplit.errors import ConfigError, check
from fedsplit.registry import pick
from simulations.core.cells import CellStore, Row, run_cells
from simulations.core.plots import draw_if_possible, picture
from simulations.core.run_folder import RunFolder
from simulations.core.settings import Experiment, read_options, resolved
from simulations.core.tables import grouped, make_table, mean
from simulations.split.lm_material import LanguageModelSplit, Tuned
from simulations.split.lm_private_schemes import drawn_targets, private_tail
from simulations.split.lm_schemes import (
    client_tail,
    noisy_tail,
    offsite,
    returned_gradients,
    unprotected_with_head,
)

# protection, its level, targets per step
SETTINGS = [
    "none:0:2048",
    "none+head:0:2048",
    "client-tail:1:2048",
    "client-tail:2:2048",
    "client-tail:3:2048",
    "own-tail:3:2048",
    "row-noise:10:2048",
    "row-noise:16:2048",
    "offsite:4:2048",
    "offsite:6:2048",
    "offsite-6:4:2048",
    "offsite+head:4:2048",
    "noisy-tail:2:2048",
    "noisy-tail:4:2048",
    "noisy-tail:8:2048",
]
OPTIONS: dict[str, Any] = {
    "seeds": 3,
    "data": ["shakespeare=../shared/data/shakespeare/input.txt"],
    "settings": SETTINGS,
    "tokens": 20480,
    "held-out": 6144,
    "lr": 1e-3,
    "lr-tail": 2e-3,
}
PLOT = "lm-frontier.png"
MEASURED = "measured.json"
MEANS = ("gain_share", "token_recovery", "guess", "text_recovery", "text_guess", "joint_recovery")
TICKS = (-2, 0, 2, 5, 10, 20, 50, 80)
LOWEST = -10.0
"""Shares of the gain below this are outside the picture."""
READABLE = 1.0  # at k = 0 without noise every row is one known vector: all tokens are read


@dataclass(frozen=True)
class Protection:
    """One way to tune: what it does, and whether representations leave.

    Attributes:
        tune: (base and texts, level, options) -> what came of it.
        rows: whether the owners' representations cross.
    """

    tune: Callable[[LanguageModelSplit, float, Mapping[str, Any]], Tuned]
    rows: bool = True


PROTECTIONS: dict[str, Protection] = {
    "none": Protection(lambda w, level, o: returned_gradients(w, o["lr"])),
    "none+head": Protection(lambda w, level, o: unprotected_with_head(w, o["lr"])),
    "row-noise": Protection(lambda w, level, o: returned_gradients(w, o["lr"], level)),
    "raw-row-noise": Protection(
        lambda w, level, o: returned_gradients(w, o["lr"], level, posterior=False)
    ),
    "client-tail": Protection(
        lambda w, level, o: client_tail(w, o["lr-tail"], int(level), average=True)
    ),
    "own-tail": Protection(
        lambda w, level, o: client_tail(w, o["lr-tail"], int(level), average=False)
    ),
    "drawn-targets": Protection(lambda w, level, o: drawn_targets(w, o["lr"], level)),
    "dp-tail": Protection(lambda w, level, o: private_tail(w, o["lr-tail"], 2, level)),
    "noisy-tail": Protection(lambda w, level, o: noisy_tail(w, o["lr-tail"], 3, level)),
    "offsite": Protection(lambda w, level, o: offsite(w, o["lr"], 4, int(level)), rows=False),
    "offsite-6": Protection(lambda w, level, o: offsite(w, o["lr"], 6, int(level)), rows=False),
    "offsite+head": Protection(
        lambda w, level, o: offsite(w, o["lr-tail"], 4, int(level), head=True), rows=False
    ),
}


def run(experiment: Experiment, folder: RunFolder, console: Console) -> None:
    """Carry out the experiment; finished cells are kept if it is killed."""
    options = read_options(experiment.options, OPTIONS)
    config = experiment.config
    task = config.model.task
    check(task == "causal-lm", "model.task", task, "causal-lm")
    sources = dict(map(_source, options["data"]))
    wanted = [_setting(text) for text in options["settings"]]
    store = CellStore.open(folder, config, options, ("seeds", "data", "settings"))
    keys = [
        {"data": data, "seed": seed, "protection": name, "level": level, "targets": targets}
        for seed in range(options["seeds"])
        for data in sources
        for name, level, targets in wanted
    ]
    make = partial(cell, config, options, sources)
    rows = run_cells(experiment, folder, console, store, keys, make, recorded)
    finished = with_shares(rows)
    text = json.dumps({"rows": measured_rows(finished)}, indent=1) + "\n"
    (folder.path / MEASURED).write_text(text, encoding="utf-8")
    console.print(table(finished))
    draw_if_possible(console, folder.path / PLOT, plot, finished)


def recorded(rows: list[Row]) -> dict[str, Any]:
    """Return what the folder records of the rows so far."""
    return {"rows": with_shares(rows)}


def _source(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    check(bool(equals and path), "options.data", text, "NAME=PATH")
    return name, str(resolved(path))


def _setting(text: str) -> tuple[str, float, int]:
    try:
        name, level, targets = text.split(":")
        found = name, float(level), int(targets)
    except ValueError:
        raise ConfigError(f"options.settings={text!r}: must be NAME:LEVEL:TARGETS") from None
    pick(PROTECTIONS, name, "protection")
    check(found[2] >= 3, "targets", found[2], ">= 3 (per step)")
    return found


def cell(
    config: RunConfig,
    options: Mapping[str, Any],
    sources: Mapping[str, str],
    *,
    data: str,
    seed: int,
    protection: str,
    level: float,
    targets: int,
) -> list[Row]:
    """Tune once, and read what left."""
    began = time.perf_counter()
    flat = replace(config, data=replace(config.data, path=sources[data]), seed=config.seed + seed)
    steps = max(1, options["tokens"] // targets)
    work = LanguageModelSplit(flat, flat.seed, targets, steps, options["held-out"])
    before = work.loss(*work.cut())
    way = PROTECTIONS[protection]
    tuned = way.tune(work, level, options)
    found = tuned.reading.shares()
    joint = tuned.joint
    if joint is None:
        joint = READABLE if way.rows else found["token_recovery"]
    return [
        {
            "model": Path(config.model.name).name,
            "data": data,
            "protection": protection,
            "level": level,
            "targets": targets,
            "steps": work.steps,
            "seed": seed,
            "loss_before": before,
            "loss": tuned.loss,
            "gain": before - tuned.loss,
            **found,
            "joint_recovery": joint,
            "seconds": time.perf_counter() - began,
        }
    ]


def with_shares(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with ``gain_share``, the gain over that without protection (None: not run).

    The unprotected run is that of the same data and seed at the first number of targets.
    """
    plain: dict[tuple[Any, Any], float] = {}
    for row in rows:
        if row["protection"] == "none":
            plain.setdefault((row["data"], row["seed"]), row["gain"])
    shares = []
    for row in rows:
        whole = plain.get((row["data"], row["seed"]))
        shares.append({**row, "gain_share": None if not whole else row["gain"] / whole})
    return shares


def measured_rows(rows: Sequence[Row]) -> list[Row]:
    """Return means over seeds, as :mod:`fedsplit.emulators.planning.language` reads them.

    Only what a run can ask for, at the unprotected run's targets per step.
    """
    known = [r for r in rows if r["gain_share"] is not None and r["protection"] in WAYS]
    first = next((r["targets"] for r in known if r["protection"] == "none"), 0)
    found = []
    for key, mine in grouped(known, "model", "data", "protection", "level", "targets").items():
        if key[-1] == first:
            names = ("model", "data", "protection", "level")
            means = {c: round(mean(mine, c), 4) for c in MEANS}
            found.append({**dict(zip(names, key, strict=False)), "runs": len(mine), **means})
    return found


def table(rows: Sequence[Row]) -> Table:
    """Return means over seeds."""
    shown = []
    for key, mine in grouped(rows, "data", "protection", "level", "targets").items():
        data, protection, level, targets = key
        columns = ("gain_share", "token_recovery", "guess", "text_recovery", "joint_recovery")
        known = all(row["gain_share"] is not None for row in mine)
        shares = [
            "" if c == "gain_share" and not known else f"{100 * mean(mine, c):.1f} %"
            for c in columns
        ]
        shown.append((data, protection, f"{level:g}", targets, *shares, len(mine)))
    return make_table(
        (
            "data",
            "protection",
            "level",
            "targets",
            "gain",
            "read",
            "guess",
            "texts",
            "joint",
            "runs",
        ),
        shown,
        title="Share of the unprotected gain, and of tokens that are read",
        left=2,
    )


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Draw kept gain over what is read beyond the guess, a panel for each data set."""
    panels = grouped([r for r in rows if r["gain_share"] is not None], "data")
    with picture(path, 1, max(1, len(panels)), figsize=(6.2 * max(1, len(panels)), 4.6)) as (
        _,
        axes,
    ):
        flat = list(axes.flat) if hasattr(axes, "flat") else [axes]
        for axis, ((data,), mine) in zip(flat, panels.items(), strict=False):
            for (name,), own in grouped(mine, "protection").items():
                points = grouped(own, "level", "targets").items()
                x = [100 * (mean(g, "token_recovery") - mean(g, "guess")) for _, g in points]
                y = [100 * mean(g, "gain_share") for _, g in points]
                colour = f"C{list(PROTECTIONS).index(name)}"  # the same in every panel
                marker = "o" if PROTECTIONS[name].rows else "^"  # ten colours serve twelve ways
                axis.scatter(x, y, label=name, s=36, color=colour, marker=marker)
                for (level, targets), at_x, at_y in zip([k for k, _ in points], x, y, strict=True):
                    text = f"{level:g}" + ("" if targets == 2048 else f", {targets}")
                    axis.annotate(
                        text, (at_x, at_y), fontsize=7, xytext=(4, 3), textcoords="offset points"
                    )
            axis.axhline(85, linewidth=0.8, linestyle=":", color="grey")
            axis.axvline(2, linewidth=0.8, linestyle=":", color="grey")
            axis.set_xscale("symlog", linthresh=5)
            axis.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS], minor=False)
            axis.minorticks_off()
            axis.set_ylim(bottom=max(LOWEST, axis.get_ylim()[0]))
            axis.set_xlabel("tokens read beyond the guess, points")
            axis.set_ylabel("share of the unprotected gain, %")
            axis.set_title(data)
        next(iter(flat)).legend(fontsize=8)
