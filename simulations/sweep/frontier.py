"""Means with intervals over seeds, and the privacy-utility frontier as a table and a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from fedsplit.statistics import mean_half_width
from simulations.core.plots import picture
from simulations.core.tables import grouped, make_table

SETTINGS = (
    "variant", "mechanism", "eta", "noise_ratio", "clip", "spare", "k", "cti", "rho", "denoise",
)  # fmt: skip
GROUP = (*SETTINGS, "label_protection")
TEMPLATE = ("-", "no", "floor", "yes")
MEASURED = ("accuracy", "loss", "empirical_privacy", "empirical_privacy_map", "touched_share")


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per setting: means over seeds, with 95 % t-intervals as half-widths.

    A mean of one seed has the half-width None, not zero.
    """
    out = []
    for key, cells in grouped((row for row in rows if not row.get("error")), *GROUP).items():
        summary: dict[str, Any] = dict(zip(GROUP, key, strict=True))
        summary["seeds"] = len(cells)
        # What not every seed keeps is not kept.
        summary["template"] = min((str(m.get("template", "-")) for m in cells), key=TEMPLATE.index)
        for name in MEASURED:
            values = [float(m[name]) for m in cells if m.get(name) is not None]
            if not values:
                continue
            summary[name] = float(np.mean(values))
            summary[f"{name}_pm"] = mean_half_width(values) if len(values) > 1 else None
        out.append(summary)
    return out


def frontier_table(summary: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table that a sweep ends with."""
    measured = ("accuracy", "empirical_privacy", "empirical_privacy_map")
    return make_table(
        (
            "variant",
            "level",
            "clip",
            "k",
            "seeds",
            "accuracy",
            "EP, nearest",
            "EP, strongest",
            "template",
            "touched",
        ),
        (
            (
                row["variant"],
                level(row),
                row["clip"],
                row["k"],
                row["seeds"],
                *(_percent(row, name, 1) for name in measured),
                row["template"],
                _percent(row, "touched_share", 2),
            )
            for row in summary
        ),
        title="mean over seeds, +- the 95 % interval of the mean",
    )


def level(row: Mapping[str, Any]) -> str:
    """Return a cell's noise in a few characters: eta, or its ratio and what is spared."""
    if not row["noise_ratio"]:
        return "no noise" if math.isinf(row["eta"]) else f"{row['eta']:g}"
    spared = "" if row["spare"] == 1 else f" / {row['spare']:g}"
    return f"r {row['noise_ratio']:g}{spared}"


def _percent(row: Mapping[str, Any], name: str, digits: int) -> str:
    if row.get(name) is None:
        return "-"
    half = row.get(f"{name}_pm")
    text = f"{100 * row[name]:.{digits}f} %"
    return text if half is None else f"{text} +- {100 * half:.{digits}f}"


def plot_frontier(path: Path, summary: Sequence[Mapping[str, Any]], floor: float = 0.0) -> None:
    """Draw accuracy against empirical privacy, a line per variant; nothing where no cell has both.

    Left: against the nearest neighbour, the paper's attacker.  Right: against the strongest.
    """
    drawn = [r for r in summary if r.get("empirical_privacy") is not None and "accuracy" in r]
    if not drawn:
        return
    variants = list(dict.fromkeys(str(r["variant"]) for r in drawn))
    panels = (
        ("empirical_privacy", "against the nearest neighbour (the paper's attacker)"),
        ("empirical_privacy_map", "against the strongest attacker measured"),
    )
    with picture(path, 1, 2, figsize=(11.5, 4.8), sharey=True) as (figure, axes):
        for axis, (column, title) in zip(axes, panels, strict=True):
            for index, variant in enumerate(variants):
                points = sorted(
                    (r for r in drawn if r["variant"] == variant and column in r),
                    key=lambda r: r[column],
                )
                axis.errorbar(
                    [100 * p[column] for p in points],
                    [100 * p["accuracy"] for p in points],
                    xerr=[100 * (p.get(f"{column}_pm") or 0.0) for p in points],
                    yerr=[100 * (p.get("accuracy_pm") or 0.0) for p in points],
                    label=variant, color=f"C{index % 10}", marker="o", capsize=3, linewidth=1.6,
                )  # fmt: skip
                for p in points:
                    axis.annotate(
                        level(p), (100 * p[column], 100 * p["accuracy"]), xytext=(5, 5),
                        textcoords="offset points", fontsize=7, color=f"C{index % 10}",
                    )  # fmt: skip
            if column == "empirical_privacy_map" and floor:
                axis.axvline(100 * floor, color="0.4", linestyle="--", linewidth=1)
                low = axis.get_xaxis_transform()
                axis.text(100 * floor, 0.02, " template's floor", fontsize=7, transform=low)
            axis.set_title(title, fontsize=10)
            axis.set_xlabel("tokens not recovered (empirical privacy), %")
            axis.margins(x=0.14)  # for the labels of the last points
            axis.grid(alpha=0.25)
        axes[0].set_ylabel("held-out accuracy, %")
        axes[0].legend(fontsize=8)  # wherever it hides least
        figure.suptitle("Privacy and utility; labels are eta or ratio, bars 95 % intervals")
