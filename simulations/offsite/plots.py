"""Pictures of the experiments on offsite tuning; matplotlib comes with the extra ``plot``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from simulations.core.plots import picture, plain_log
from simulations.core.tables import mean

Rows = Sequence[Mapping[str, Any]]
# column -> marker, colour, label
POINTS: dict[str, tuple[str, str, str]] = {
    "emulator_zero_shot": ("v", "#bbbbbb", "emulator, zero-shot"),
    "emulator_ft": ("s", "#d62728", "emulator, tuned (owners)"),
    "plug_in": ("o", "#1f77b4", "plug-in (model owner)"),
    "adapters_in_full": ("|", "#111111", "the same blocks tuned in the full model"),
}
CURVES: dict[str, tuple[str, str]] = {
    "plug_in": ("#1f77b4", "plug-in"),
    "emulator_ft": ("#d62728", "emulator, tuned"),
    "emulator_zero_shot": ("#bbbbbb", "emulator, zero-shot"),
}

# attacker -> line style
LINES: dict[str, Any] = {
    "control": (0, (1, 5)),
    "lm": ":",
    "lm-regrow": "-.",
    "queries": "--",
    "queries-regrow": "-",
}


def table_plot(path: Path, rows: Rows) -> None:
    """Draw held-out perplexity of each method, a point per seed; lines at the base's own."""
    methods = list(dict.fromkeys(str(row["method"]) for row in rows))
    with picture(path, figsize=(8.4, 1.2 + 0.55 * len(methods))) as (_, axes):
        for column, (marker, colour, label) in POINTS.items():
            at = [(row[column], methods.index(str(row["method"]))) for row in rows]
            axes.scatter(
                *zip(*at, strict=True), marker=marker, c=colour, label=label, s=42, zorder=3
            )
        for column, style in (("full_zero_shot", "--"), ("full_ft", ":")):
            if any(row.get(column) is not None for row in rows):
                middle = mean(rows, column)
                axes.axvline(middle, color="#777777", linestyle=style, linewidth=0.9)
                axes.text(middle, -0.75, column.replace("_", " "), fontsize=7, ha="center")
        axes.set_yticks(range(len(methods)), methods)
        axes.set(xscale="log", xlabel="held-out perplexity (lower is better)")
        axes.set_ylim(len(methods) - 0.5, -1.0)
        plain_log(axes.xaxis)
        axes.grid(axis="y", color="#eeeeee")
        axes.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)


def importance_plot(
    path: Path, scores: Mapping[str, Sequence[float]], rank_by: str = "scores"
) -> None:
    """Draw importance of each block, a bar per seed (ScaleOT's figure 6): high means "keep".

    ``scores`` are, per seed, a number per block: the row ``rank_by`` of ScaleOT's ``RANKS``.
    """
    with picture(path, figsize=(8.4, 3.2)) as (_, axes):
        width = 0.8 / max(1, len(scores))
        for k, (seed, values) in enumerate(scores.items()):
            positions = [i + (k - (len(scores) - 1) / 2) * width for i in range(len(values))]
            axes.bar(positions, values, width, label=f"seed {seed}")
        if rank_by == "costs":  # the first block's is tens of times the others'
            axes.set(yscale="log", ylabel="KL(full, replaced), nats")
            plain_log(axes.yaxis)
        else:
            axes.set_ylabel("importance score")
            axes.axhline(0, color="#777777", linewidth=0.7)
        axes.set_xlabel("block")
        axes.set_xticks(range(max((len(v) for v in scores.values()), default=0)))
        axes.legend(fontsize=7)


def sweep_plot(path: Path, rows: Rows) -> None:
    """Draw perplexity against alpha, and against beta for each target (ScaleOT's figures 3 and 4).

    Means over seeds; bars from the lowest to the highest seed.
    """
    panels = list(dict.fromkeys((str(r["knob"]), str(r["target"])) for r in rows))
    size = (1.0 + 3.1 * len(panels), 5.6)
    # Tuned networks apart from untuned ones, whose range would hide the difference that matters.
    with picture(path, 2, len(panels), figsize=size, sharey="row", squeeze=False) as (_, grid):
        for at, columns in enumerate((("plug_in", "emulator_ft"), ("emulator_zero_shot",))):
            for axes, (knob, target) in zip(grid[at], panels, strict=True):
                mine = [r for r in rows if (str(r["knob"]), str(r["target"])) == (knob, target)]
                values = sorted({float(r["value"]) for r in mine})
                for column in columns:
                    colour, label = CURVES[column]
                    found = [
                        [float(r[column]) for r in mine if float(r["value"]) == v] for v in values
                    ]
                    means = [math.exp(sum(map(math.log, f)) / len(f)) for f in found]
                    spread = [
                        [max(0.0, m - min(f)) for m, f in zip(means, found, strict=True)],
                        [max(0.0, max(f) - m) for m, f in zip(means, found, strict=True)],
                    ]
                    axes.errorbar(
                        values, means, spread, color=colour, marker="o", markersize=4, label=label
                    )
                axes.set(yscale="log", xlabel=f"{knob}, {target}" if target else knob)
                plain_log(axes.yaxis)
                axes.grid(color="#eeeeee")
            grid[at][0].set_ylabel("held-out perplexity")
            grid[at][0].legend(fontsize=7)


def closed_plot(path: Path, rows: Rows) -> None:
    """Draw both gaps side by side, a line for each emulator and attacker, means over seeds.

    Intervals are those over blocks of the first seed.
    """
    methods = list(dict.fromkeys(str(r["method"]) for r in rows))
    attacks = list(dict.fromkeys(str(r["attack"]) for r in rows))
    titles = {"public": "held-out public text", "task": "the owner's task, tuned adapters"}
    bottom = 0.05 + 0.035 * len(attacks)
    size = (12, 5.6)
    with picture(path, 1, 2, dpi=110, bottom=bottom, figsize=size, sharey=True) as (figure, axes):
        for axis, (gap, title) in zip(axes, titles.items(), strict=True):
            for number, method in enumerate(methods):
                for attack in attacks:
                    mine = [r for r in rows if r["method"] == method and r["attack"] == attack]
                    points = _points(mine, gap)
                    if not points:
                        continue
                    tokens, shares, low, high = (
                        list(column) for column in zip(*points, strict=True)
                    )
                    style = {"linestyle": LINES.get(attack, "-"), "marker": "o", "markersize": 3}
                    label, colour = f"{method}, {attack}", f"C{number}"
                    axis.plot(tokens, shares, label=label, color=colour, **style)
                    axis.fill_between(tokens, low, high, color=colour, alpha=0.08)
            if not axis.lines:
                where = {"transform": axis.transAxes, "ha": "center", "va": "center"}
                axis.text(0.5, 0.5, "no gap: nothing to close", color="0.4", **where)
            axis.axhline(0, color="0.7", linewidth=0.8)
            axis.axhline(1, color="0.7", linewidth=0.8)
            axis.set_title(title)
            axis.set_xlabel("tokens that the attacker trained on")
        axes[0].set_ylabel("share of the gap to the full model closed")
        handles, labels = axes[0].get_legend_handles_labels()
        if handles:  # below: a dozen lines hide what they name; a column for each emulator
            columns = len(methods)
            figure.legend(handles, labels, loc="lower center", ncols=columns, fontsize=8)


def _points(rows: Rows, gap: str) -> list[tuple[float, ...]]:
    """Return (tokens, mean share, low, high) where there is a share."""
    found: list[tuple[float, ...]] = []
    for tokens in sorted({int(r["tokens"]) for r in rows}):
        here = [r for r in rows if r["tokens"] == tokens and r[f"{gap}_closed"] is not None]
        if here:
            ends = (float(here[0][f"{gap}_{end}"]) for end in ("low", "high"))
            found.append((float(tokens), mean(here, f"{gap}_closed"), *ends))
    return found
