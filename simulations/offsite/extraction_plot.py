"""Picture of the extraction experiment: closed share against the attacker's budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsplit.errors import RunError

LINES: dict[str, Any] = {
    "control": (0, (1, 5)),
    "lm": ":",
    "lm-regrow": "-.",
    "queries": "--",
    "queries-regrow": "-",
}


def closed_plot(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """Draw both gaps side by side, a line for each emulator and attacker, means over seeds.

    Intervals are those over blocks of the first seed.

    Returns:
        The file's name.

    Raises:
        RunError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise RunError(f"matplotlib: {error}: pip install 'fedsplit[plot]'") from None
    mpl.use("Agg")
    from matplotlib import pyplot

    methods = list(dict.fromkeys(str(r["method"]) for r in rows))
    attacks = list(dict.fromkeys(str(r["attack"]) for r in rows))
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5.6), sharey=True)
    titles = {"public": "held-out public text", "task": "the owner's task, tuned adapters"}
    for axis, (gap, title) in zip(axes, titles.items(), strict=True):
        for number, method in enumerate(methods):
            for attack in attacks:
                mine = [r for r in rows if r["method"] == method and r["attack"] == attack]
                points = _points(mine, gap)
                if not points:
                    continue
                tokens, shares, low, high = (list(column) for column in zip(*points, strict=True))
                colour = f"C{number}"
                line = LINES.get(attack, "-")
                style = {"linestyle": line, "color": colour, "marker": "o", "markersize": 3}
                axis.plot(tokens, shares, label=f"{method}, {attack}", **style)
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
    figure.tight_layout(rect=(0, 0.05 + 0.035 * len(attacks), 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path.name


def _points(rows: Sequence[Mapping[str, Any]], gap: str) -> list[tuple[float, ...]]:
    """Return (tokens, mean share, low, high) where there is a share."""
    found: list[tuple[float, ...]] = []
    for tokens in sorted({int(r["tokens"]) for r in rows}):
        here = [r for r in rows if r["tokens"] == tokens and r[f"{gap}_closed"] is not None]
        if here:
            mean = sum(float(r[f"{gap}_closed"]) for r in here) / len(here)
            found.append(
                (float(tokens), mean, float(here[0][f"{gap}_low"]), float(here[0][f"{gap}_high"]))
            )
    return found
