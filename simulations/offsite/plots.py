"""Pictures of the experiments on offsite tuning; matplotlib comes with the extra ``plot``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from fedsplit.errors import RunError

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


def drawn(console: Console, draw: Callable[[], None]) -> None:
    """Draw a picture; without matplotlib say so and go on: the figures are in results.json."""
    try:
        draw()
    except RunError as error:
        console.print(f"[yellow]no picture[/yellow]: {error}", highlight=False)


def table_plot(path: Path, rows: Rows) -> None:
    """Held-out perplexity of each method, a point per seed; lines at the base's own figures.

    Raises:
        RunError: matplotlib is not installed.
    """
    plt = _pyplot()
    methods = list(dict.fromkeys(str(row["method"]) for row in rows))
    figure, axes = plt.subplots(figsize=(8.4, 1.2 + 0.55 * len(methods)))
    for column, (marker, colour, label) in POINTS.items():
        at = [(row[column], methods.index(str(row["method"]))) for row in rows]
        axes.scatter(*zip(*at, strict=True), marker=marker, c=colour, label=label, s=42, zorder=3)
    for column, style in (("full_zero_shot", "--"), ("full_ft", ":")):
        values = [float(row[column]) for row in rows if row.get(column) is not None]
        if values:
            mean = sum(values) / len(values)
            axes.axvline(mean, color="#777777", linestyle=style, linewidth=0.9)
            axes.text(mean, -0.75, column.replace("_", " "), fontsize=7, ha="center")
    axes.set_yticks(range(len(methods)), methods)
    axes.set(xscale="log", xlabel="held-out perplexity (lower is better)")
    axes.set_ylim(len(methods) - 0.5, -1.0)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.xaxis.set_minor_formatter("{x:.0f}")
    axes.grid(axis="y", color="#eeeeee")
    axes.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)
    _save(plt, figure, path)


def importance_plot(
    path: Path, scores: Mapping[str, Sequence[float]], rank_by: str = "scores"
) -> None:
    """Importance of each block, a bar per seed (ScaleOT's figure 6): high means "keep".

    Args:
        path: of the picture.
        scores: seed -> a number per block.
        rank_by: what they are, a row of ``fedsplit.emulators.compressors.scaleot.RANKS``.

    Raises:
        RunError: matplotlib is not installed.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(8.4, 3.2))
    width = 0.8 / max(1, len(scores))
    for k, (seed, values) in enumerate(scores.items()):
        places = [i + (k - (len(scores) - 1) / 2) * width for i in range(len(values))]
        axes.bar(places, values, width, label=f"seed {seed}")
    if rank_by == "costs":  # the first block's is tens of times the others'
        axes.set(yscale="log", ylabel="KL(full, replaced), nats")
    else:
        axes.set_ylabel("importance score")
        axes.axhline(0, color="#777777", linewidth=0.7)
    axes.set_xlabel("block")
    axes.set_xticks(range(max((len(v) for v in scores.values()), default=0)))
    axes.legend(fontsize=7)
    _save(plt, figure, path)


def sweep_plot(path: Path, rows: Rows) -> None:
    """Perplexity against alpha, and against beta for each target (ScaleOT's figures 3 and 4).

    Means over seeds; bars from the lowest to the highest seed.

    Raises:
        RunError: matplotlib is not installed.
    """
    plt = _pyplot()
    panels = list(dict.fromkeys((str(r["knob"]), str(r["target"])) for r in rows))
    size = (1.0 + 3.1 * len(panels), 5.6)
    # Tuned networks apart from untuned ones, whose range would hide the difference that matters.
    figure, grid = plt.subplots(2, len(panels), figsize=size, sharey="row", squeeze=False)
    for at, columns in enumerate((("plug_in", "emulator_ft"), ("emulator_zero_shot",))):
        for axes, (knob, target) in zip(grid[at], panels, strict=True):
            mine = [r for r in rows if (str(r["knob"]), str(r["target"])) == (knob, target)]
            values = sorted({float(r["value"]) for r in mine})
            for column in columns:
                colour, label = CURVES[column]
                found = [[float(r[column]) for r in mine if float(r["value"]) == v] for v in values]
                means = [math.exp(sum(map(math.log, f)) / len(f)) for f in found]
                spread = [
                    [m - min(f) for m, f in zip(means, found, strict=True)],
                    [max(f) - m for m, f in zip(means, found, strict=True)],
                ]
                axes.errorbar(
                    values, means, spread, color=colour, marker="o", markersize=4, label=label
                )
            axes.set(yscale="log", xlabel=f"{knob}, {target}" if target else knob)
            axes.yaxis.set_major_formatter("{x:.0f}")
            axes.yaxis.set_minor_formatter("{x:.0f}")
            axes.grid(color="#eeeeee")
        grid[at][0].set_ylabel("held-out perplexity")
        grid[at][0].legend(fontsize=7)
    _save(plt, figure, path)


def _pyplot() -> Any:
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise RunError(f"matplotlib: {error}: pip install 'fedsplit[plot]'") from None
    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(plt: Any, figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
