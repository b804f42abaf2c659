"""The kind ``lineage-table``: every fingerprint on descendants and strangers of real checkpoints.

Rows are pairs.  Positives are descendants made here (:mod:`simulations.lineage.descendants`),
negatives all pairs of bases of one width and every descendant against another base; both again
after each function-preserving map.  Then one base is trained on, further and further, to show where
each fingerprint loses it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from fedsplit.errors import LineageError, UnsupportedModelError, check
from fedsplit.fingerprints import FINGERPRINTS, WeightView
from fedsplit.fingerprints.evasion.transforms import TRANSFORMS, transform
from fedsplit.fingerprints.gate.verdict import NullDistribution, separation
from fedsplit.models.loading import LoadedModel
from fedsplit.statistics import auc
from simulations.core.cells import FILE, CellStore, Row
from simulations.core.progress import RunProgress
from simulations.core.run_folder import RunFolder
from simulations.core.settings import Experiment, numbers, read_options
from simulations.core.tables import make_table
from simulations.lineage.base_models import (
    Base,
    chosen,
    find_bases,
    load_base,
    own_bases,
    retrained,
)
from simulations.lineage.descendants import (
    RECIPES,
    ModelStore,
    Texts,
    Training,
    Windows,
    read_texts,
    train,
)
from simulations.lineage.plots import breaking_plot, lineage_sheet
from simulations.runtime.machine import limited_threads

OPTIONS: dict[str, Any] = {
    "models": "",  # a folder of independent checkpoints; empty: small twins trained here
    "bases": "",  # comma-separated names of those that get descendants; empty: one per width
    "text": "",  # a text file to tune on; empty: docstrings
    "other": "",  # a text file for further training; empty: source code
    "own-bases": 3,
    "own-steps": 400,
    "retrained": 2,  # twins trained from scratch in the shape of the narrowest base of a folder
    "steps": 60,
    "lr": 2e-4,
    "batch": 8,
    "length": 64,
    "threads": 1,  # matrices this small wait longer for a second thread than they take
    "transforms": True,
    "breaking-base": "",  # empty: the middle one of those with descendants
    "breaking-lr": 3e-3,
    "breaking-steps": "10,30,100,300,600,1000",
    "portrait-size": 128,
}
COLUMNS = tuple(FINGERPRINTS)
Live = Mapping[str, LoadedModel]


def run(experiment: Experiment, folder: RunFolder, console: Console) -> None:
    """Carry out the experiment; rows are recorded as they are made."""
    options = read_options(experiment.options, OPTIONS)
    folder.write_config(experiment.config.to_flat() | {"options": options})
    plan = Training(options["steps"], options["lr"], options["batch"], options["length"])
    stops = numbers("breaking-steps", options["breaking-steps"], int)
    good = stops == sorted(set(stops)) and stops[0] >= 1
    check(good, "options.breaking-steps", stops, "increasing, >= 1")
    models = ModelStore(folder.path / "models")
    rows: list[dict[str, Any]] = []
    began = time.perf_counter()
    with limited_threads(options["threads"]), RunProgress(console) as progress:
        texts = read_texts(options["text"], options["other"])
        progress.stage("base models")
        bases = all_bases(models, options, texts, plan)
        live = {base.name: load_base(base) for base in bases}
        parents = chosen(bases, options["bases"])
        picked = parents[len(parents) // 2]
        if options["breaking-base"]:
            picked = chosen(bases, options["breaking-base"])[0]
        family: dict[str, list[tuple[str, str, LoadedModel]]] = {}
        made: list[dict[str, Any]] = []
        progress.stage("descendants")
        for n, base in enumerate(parents):
            for m, (name, recipe) in enumerate(RECIPES.items()):
                loaded, facts = models.descendant(base.path, name, texts, plan)
                suspect = f"{base.name}-{name}"
                family.setdefault(base.name, []).append((suspect, recipe.relation, loaded))
                made.append({"name": suspect, "relation": recipe.relation, **facts})
                progress.update((n + (m + 1) / len(RECIPES)) / len(parents), suspect)
        folder.record(about=experiment.about, bases=[b.name for b in bases], descendants=made)

        progress.stage("comparing")
        plans = list(_pairs(bases, live, parents, family, options["transforms"]))
        skipped: list[dict[str, Any]] = []
        settings = {"fingerprints": COLUMNS}
        store = CellStore(folder.path / FILE, settings, earlier_rows(folder.path / "rows.json"))
        for n, pair in enumerate(plans):
            base_name, suspect, relation, how, loaded = pair
            try:
                key = {"base": live[base_name].digest, "suspect": loaded.digest, "transform": how}
                [found] = store.rows(key, partial(compared, live[base_name], loaded, how))
            except (LineageError, UnsupportedModelError) as error:
                skipped.append({"suspect": suspect, "transform": how, "why": str(error)})
                continue
            row = {"base": base_name, "suspect": suspect, "relation": relation, "transform": how}
            rows.append(row | found)
            progress.update((n + 1) / len(plans), f"{base_name} - {suspect}")
            if n % 10 == 9:
                folder.record(rows=rows)
        folder.record(rows=rows, skipped=skipped, separation=separations(rows))
        say_rows(progress, rows)

        progress.stage("training on until each breaks")
        breaking = breaking_series(picked, texts, plan, stops, options["breaking-lr"], progress)
        limits = {c: _most(rows, c) for c in COLUMNS}
        broken = broken_at(breaking, limits)
        folder.record(breaking={"base": picked.name, "steps": breaking, **broken})
        plots = [breaking_plot(folder.path / "breaking.png", picked.name, breaking, limits)]
        columns = []
        for base in [*parents, *(b for b in bases if b.name not in family)]:
            own = [(n.removeprefix(f"{base.name}-"), m) for n, _, m in family.get(base.name, ())]
            columns.append((base.name, [("base", live[base.name]), *own]))
        plots.append(lineage_sheet(folder.path / "sheet.png", columns, options["portrait-size"]))
        folder.record(pictures=plots, seconds=round(time.perf_counter() - began, 1))
    print_table(console, rows)
    for path in plots:
        console.print(f"picture: {folder.path / path}")


def all_bases(
    store: ModelStore, options: Mapping[str, Any], texts: Texts, plan: Training
) -> list[Base]:
    """Return the folder's checkpoints and retrained twins of the narrowest, or own twins."""
    scratch = Training(options["own-steps"], 2e-3, 2 * plan.batch, plan.length, plan.seed)
    if not options["models"]:
        return own_bases(store, options["own-bases"], scratch)
    bases = find_bases(options["models"])
    narrow = min(bases, key=lambda base: base.width)
    return bases + retrained(store, narrow, options["retrained"], texts.tuning, scratch)


def compare(base: nn.Module, suspect: nn.Module) -> Row:
    """Return every fingerprint's value; None where it refuses the pair."""
    views = WeightView.of_module(base), WeightView.of_module(suspect)
    found: Row = {}
    for name in COLUMNS:
        try:
            found[name] = FINGERPRINTS[name]().compare(*views).value
        except LineageError:
            found[name] = None
    return found


def compared(base: LoadedModel, suspect: LoadedModel, how: str) -> list[Row]:
    """Return every fingerprint of a pair, the suspect changed by the map ``how`` unless "none"."""
    model = suspect.model if how == "none" else transform(suspect.model, how).model
    return [compare(base.model, model)]


def earlier_rows(path: Path) -> Iterator[tuple[dict[str, str], list[Row]]]:
    """Yield the pairs that earlier versions kept in ``rows.json``, under their keys of today."""
    names = ("base", "suspect", "transform")
    try:
        found: dict[str, Row] = json.loads(path.read_text(encoding="utf-8"))
        for key, values in found.items():
            if values.keys() == set(COLUMNS):
                yield dict(zip(names, key.split(" "), strict=True)), [values]
    except (OSError, ValueError, AttributeError):  # none, or damaged: the pairs are compared again
        return


Pair = tuple[str, str, str, str, LoadedModel]


def _pairs(
    bases: Sequence[Base],
    live: Live,
    parents: Sequence[Base],
    family: Mapping[str, Sequence[tuple[str, str, LoadedModel]]],
    maps: bool,
) -> Iterator[Pair]:
    """Yield (base, suspect, relation, map, the suspect before the map)."""
    names = ["none", *(TRANSFORMS if maps else ())]
    for base in parents:
        for suspect, relation, loaded in family[base.name]:
            for how in names if relation in ("fine-tuned", "lora") else ["none"]:
                yield base.name, suspect, relation, how, loaded
            for other in bases:
                if other.width == base.width and other.name != base.name:
                    yield other.name, suspect, "independent", "none", loaded
    for n, base in enumerate(bases):
        for other in bases[n + 1 :]:
            if other.width == base.width:
                for how in names:
                    yield base.name, other.name, "independent", how, live[other.name]


def separations(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return AUC and |Z| per fingerprint, on the models as they are and over every map of them.

    Z is measured in the spread of pairs of bases, one each: a base's descendants repeat its own
    similarity to a stranger and would make the spread look smaller than it is.
    """
    out = []
    descendants = {r["suspect"] for r in rows if r["relation"] != "independent"}
    for column in COLUMNS:
        for maps in (False, True):
            kept = [r for r in rows if (maps or r["transform"] == "none") and r[column] is not None]
            apart = [r for r in kept if r["relation"] == "independent"]
            stranger = [float(r[column]) for r in apart]
            pairs = [float(r[column]) for r in apart if r["suspect"] not in descendants]
            pairs = pairs if len(pairs) >= 3 else stranger
            related = [float(r[column]) for r in kept if r["relation"] != "independent"]
            if len(stranger) < 2 or not related:
                continue
            tuned = [float(r[column]) for r in kept if r["relation"] in ("fine-tuned", "lora")]
            out.append(
                {
                    "fingerprint": column,
                    "models": "with every map" if maps else "as they are",
                    "auc": auc(related, stranger),
                    "z": separation(related, pairs),
                    "z_tuned": separation(tuned, pairs) if tuned else None,
                    "related_least": min(related),
                    "tuned_least": min(tuned, default=None),
                    "independent_mean": sum(stranger) / len(stranger),
                    "independent_most": max(stranger, key=abs),
                    "related": len(related),
                    "independent": len(stranger),
                    "base_pairs": len(pairs),
                }
            )
    return out


def _most(rows: Sequence[Mapping[str, Any]], column: str) -> tuple[float, float, float]:
    """Return (mean, standard deviation) of pairs of bases, and the maximum of independent pairs."""
    descendants = {r["suspect"] for r in rows if r["relation"] != "independent"}
    kept = [r for r in rows if r["relation"] == "independent" and r["transform"] == "none"]
    values = {(r["base"], r["suspect"]): float(r[column]) for r in kept if r[column] is not None}
    pairs = [v for (_, suspect), v in values.items() if suspect not in descendants]
    null = NullDistribution(tuple(pairs if len(pairs) >= 3 else values.values()))
    return null.mean, null.sd, max(values.values())


def breaking_series(
    base: Base,
    texts: Texts,
    plan: Training,
    stops: Sequence[int],
    lr: float,
    progress: RunProgress,
) -> list[dict[str, Any]]:
    """Train a copy on other text at a high rate; compare after each number of steps."""
    original, tuned = load_base(base), load_base(base)
    model: nn.Module = tuned.model
    windows = Windows(tuned.tokenizer, texts.other, plan.length, plan.seed)
    rows: list[dict[str, Any]] = []

    def look(step: int) -> None:
        if step in stops:
            model.eval()
            row = {"steps": step, "perplexity": windows.perplexity(model)}
            rows.append(row | compare(original.model, model))
            model.train()
        progress.update(step / stops[-1])

    train(model, windows, replace(plan, steps=stops[-1], lr=lr), after=look)
    return rows


def broken_at(
    series: Sequence[Mapping[str, Any]], limits: Mapping[str, tuple[float, float, float]]
) -> dict[str, Any]:
    """Return the first step at which each fingerprint is no higher than its highest stranger."""
    out: dict[str, Any] = {}
    for column, (_, _, most) in limits.items():
        found = [r["steps"] for r in series if r[column] is not None and r[column] <= most]
        out[column] = found[0] if found else None
    return {"broken_at": out, "highest_stranger": {c: most for c, (_, _, most) in limits.items()}}


def say_rows(progress: RunProgress, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print one line: how many pairs, and the two bounds that the gate rests on."""
    tuned = [r["score"] for r in rows if r["relation"] in ("fine-tuned", "lora")]
    strangers = [abs(r["score"]) for r in rows if r["relation"] == "independent"]
    if tuned and strangers:
        progress.say(
            f"{len(rows)} pairs: tuned descendants score at least {min(tuned):.3f}, "
            f"strangers at most {max(strangers):.3f}"
        )


def print_table(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print every pair as it is, then separation."""

    def shown(row: Mapping[str, Any], columns: Sequence[str]) -> list[Any]:
        return [f"{row[c]:.3f}" if isinstance(row[c], float) else row[c] for c in columns]

    columns: Sequence[str] = ("base", "suspect", "relation", *COLUMNS)
    plain = (shown(row, columns) for row in rows if row["transform"] == "none")
    heads = [name.replace("_", " ") for name in columns]
    console.print(make_table(heads, plain, title="Pairs (models as they are)", left=3))
    columns = ("fingerprint", "models", "auc", "z", "z_tuned", "tuned_least", "independent_most")
    heads = [name.replace("_", " ") for name in columns]
    found = (shown(row, columns) for row in separations(rows))
    console.print(make_table(heads, found, title="Separation", left=2))
