"""Pictures of the lineage experiments; matplotlib comes with the extra ``plot``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsplit.fingerprints import FINGERPRINTS, WeightView
from fedsplit.models.loading import LoadedModel
from simulations.core.plots import picture, plain_log


def breaking_plot(
    path: Path,
    base: str,
    series: Sequence[Mapping[str, Any]],
    limits: Mapping[str, tuple[float, float, float]],
) -> str:
    """Draw similarity and distance from strangers against steps; return the file's name.

    ``limits`` are (mean, standard deviation, maximum) of independent pairs, per fingerprint.
    """
    with picture(path, 1, 2, figsize=(12, 4.8)) as (_, (left, right)):
        steps = [row["steps"] for row in series]
        for name, fingerprint in FINGERPRINTS.items():
            colour, label = fingerprint.colour, fingerprint.label
            values = [row[name] for row in series]
            if any(v is None for v in values):
                continue
            mean, sd, most = limits[name]
            left.plot(steps, values, color=colour, marker="o", markersize=3, label=label)
            left.plot(
                [steps[0], steps[-1]], [most, most], color=colour, linestyle=":", linewidth=0.9
            )
            z = [max(0.05, (v - mean) / sd) for v in values]
            right.plot(steps, z, color=colour, marker="o", markersize=3, label=label)
        left.set(xscale="log", xlabel="steps of further training", ylabel="similarity to the base")
        left.set_title(f"{base} (dotted: its highest stranger)", fontsize=10)
        right.set(xscale="log", yscale="log", xlabel="steps of further training")
        plain_log(left.xaxis, right.xaxis, right.yaxis)
        right.set_ylabel("Z from strangers")
        right.axhline(3.0, color="#bbbbbb", linewidth=0.8)
        right.set_title("in standard deviations of independent pairs (line: 3)", fontsize=10)
        left.legend(fontsize=8)
    return path.name


def penalty_plot(path: Path, base: str, points: Sequence[Mapping[str, Any]]) -> str:
    """Draw similarity against perplexity, a point per penalty weight; return the file's name."""
    with picture(path, figsize=(6.4, 4.8)) as (_, axes):
        ordered = sorted(points, key=lambda row: float(row["weight"]))
        for name in ("score", "ics_whitened", "awm", "pcs"):
            colour, label = FINGERPRINTS[name].colour, FINGERPRINTS[name].label
            x, y = ([row[key] for row in ordered] for key in (name, "perplexity"))
            axes.plot(x, y, color=colour, marker="o", markersize=4, label=label)
        beside = {"fontsize": 7, "xytext": (4, 4), "textcoords": "offset points"}
        for row in ordered:
            axes.annotate(f"{row['weight']:g}", (row["score"], row["perplexity"]), **beside)
        axes.axhline(points[0]["perplexity_base"], color="#bbbbbb", linestyle="--", linewidth=0.8)
        axes.set(yscale="log", xlabel="similarity to the base", ylabel="held-out perplexity")
        plain_log(axes.yaxis)
        axes.set_title(
            f"{base}: fine-tuning with a penalty on the score (numbers: weight)", fontsize=9
        )
        axes.legend(fontsize=8)
    return path.name


def lineage_sheet(
    path: Path, columns: Sequence[tuple[str, Sequence[tuple[str, LoadedModel]]]], size: int
) -> str:
    """Draw portraits and return the file's name.

    A column per base, its descendants under it, read on the base's token list.
    """
    from fedsplit.fingerprints.evidence import public_file
    from fedsplit.fingerprints.portraits import encoder
    from fedsplit.fingerprints.portraits.sheet import draw_sheet

    reader = encoder.load()
    drawn = []
    for title, entries in columns:
        base = WeightView.of_module(entries[0][1].model)
        listed = public_file.make(base, title).tokens
        vectors = []
        for label, loaded in entries:
            view = WeightView.of_module(loaded.model)
            found = public_file.make(view, label, tokens=listed)
            vectors.append((label, encoder.vector(found, reader)))
        drawn.append((title, vectors))
    draw_sheet(drawn, path, size=size)
    return path.name
