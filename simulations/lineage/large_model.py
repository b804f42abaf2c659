"""The kind ``lineage-llm``: one large model, its descendants and strangers, judged one by one.

A cell is one suspect: it is made from the base, compared by every fingerprint of the table and
dropped, so that two models are in memory at a time and a killed experiment goes on with the next
suspect.  The verdict's fingerprint (aligned products) reads another width in the directions that
both embeddings know; those that need equal widths have no value then.
"""

from __future__ import annotations

import copy
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fedsplit.commands.compare import between_widths
from fedsplit.errors import LineageError, UnsupportedModelError, check
from fedsplit.fingerprints import FINGERPRINTS
from fedsplit.fingerprints.evasion.transforms import TRANSFORMS, transform
from fedsplit.fingerprints.evidence import public_file
from fedsplit.fingerprints.gate.verdict import judge
from fedsplit.fingerprints.portraits import encoder
from fedsplit.fingerprints.portraits.sheet import draw_sheet
from fedsplit.fingerprints.view import WeightView, choose_tokens
from fedsplit.models.loading import HEADS, load
from fedsplit.seeding import derive_seed
from simulations.core.cells import CellStore, Row, run_cells
from simulations.core.run_folder import RunFolder
from simulations.core.setting import ExperimentSetting
from simulations.core.settings import Experiment, read_options
from simulations.core.tables import make_table
from simulations.lineage.cuts import cut_width, drop_blocks
from simulations.lineage.descendants import RATES, RECIPES, Training, Windows, read_texts, train
from simulations.runtime.machine import limited_threads

OTHERS = tuple(name for name in FINGERPRINTS if name != "score")
TRAINED = ("fine-tuned", "lora", "further-trained", "vocabulary")
UNTRAINED = ("pruned", "quantised-8", "quantised-4", "width-pruned", "blocks-dropped")
HEALED = "width-trained"
HEALING_RATE = 5.0  # learning rate of its training, in units of the plan's
IMPORTANCE_ROWS = 32  # windows of the tuning text that say what a cut in width keeps
DESCENDANTS = (*UNTRAINED, HEALED, *TRAINED)
OPTIONS: dict[str, Any] = {
    "steps": 20,  # of those descendants that are trained; 0: they are left out
    "narrow-steps": 100,  # of the one that is trained after its width is cut; 0: it is left out
    "lr": 1e-4,
    "batch": 4,
    "length": 64,
    "suspects": list(DESCENDANTS),  # made of the base, beside maps
    "transforms": ["rotation", "vo_maps"],  # function-preserving maps of the base
    "width": 0.75,  # share of the residual directions and hidden units that a cut keeps
    "drop": 4,  # every so many-th block is dropped
    "strangers": "",  # comma-separated names of independent models; one of the base's shape is made
    "text": "",
    "other": "",
    "fingerprints": list(OTHERS),  # beside the verdict's; "reef" runs both models
    "windows": 32,  # of the held-out text that perplexity is measured on
    "threads": 1,
    "portrait-size": 128,
}
MADE = "same shape, new weights"
PORTRAIT = "portrait"
WHY = "why"  # of a suspect that was left out


def run(experiment: Experiment, folder: RunFolder, console: Console) -> None:
    """Carry out the experiment; finished suspects are kept if it is killed."""
    options = read_options(experiment.options, OPTIONS)
    check(options["steps"] >= 0, "options.steps", options["steps"], ">= 0")
    check(options["narrow-steps"] >= 0, "options.narrow-steps", options["narrow-steps"], ">= 0")
    check(0 < options["width"] < 1, "options.width", options["width"], "in (0, 1)")
    check(options["drop"] >= 2, "options.drop", options["drop"], ">= 2")
    for name in options["suspects"]:
        check(name in DESCENDANTS, "options.suspects", name, f"one of {', '.join(DESCENDANTS)}")
    for name in options["transforms"]:
        check(name in TRANSFORMS, "options.transforms", name, f"one of {', '.join(TRANSFORMS)}")
    for name in options["fingerprints"]:
        check(name in OTHERS, "options.fingerprints", name, f"one of {', '.join(OTHERS)}")
    check(options["windows"] >= 1, "options.windows", options["windows"], ">= 1")
    choosing = ("suspects", "transforms", "strangers", "threads", "portrait-size")
    store = CellStore.open(folder, experiment.config, options, choosing)
    setting = LargeModel(experiment.config, {**store.options, **options}, folder.path, store)
    untaught = {HEALED} if options["narrow-steps"] == 0 else set()
    untaught |= set(TRAINED) if options["steps"] == 0 else set()
    strangers = [name.strip() for name in options["strangers"].split(",") if name.strip()]
    keys = [{"suspect": name} for name in options["suspects"] if name not in untaught]
    keys += [{"suspect": f"map {name}"} for name in options["transforms"]]
    keys += [{"suspect": f"stranger {name}"} for name in (MADE, *strangers)]
    with limited_threads(options["threads"]):
        rows = run_cells(experiment, folder, console, store, keys, setting.cell, facts)
        for row in facts(rows)["skipped"]:
            console.print(f"left out: {row['suspect']}: {row[WHY]}")
        rows = [row for row in rows if WHY not in row]
        path = folder.path / "sheet.png"
        folder.record(pictures=draw_portraits(path, setting, rows, options["portrait-size"]))
    others = options["fingerprints"]
    columns = ("suspect", "relation", "width", *others, "score", "z", "verdict", "seconds")
    shown = ([row[c] for c in columns] for row in map(_rounded, rows))
    heads = [name.replace("_", " ") for name in columns]
    console.print(make_table(heads, shown, title=f"Against {experiment.config.model.name}", left=2))


def facts(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows, without what only the picture needs, and the suspects left out."""
    kept = [{k: v for k, v in row.items() if k != PORTRAIT} for row in rows]
    return {
        "rows": [row for row in kept if WHY not in row],
        "skipped": [row for row in kept if WHY in row],
    }


@dataclass
class LargeModel(ExperimentSetting):
    """The base, and what is made of it."""

    def cell(self, suspect: str) -> list[Row]:
        """Return the row of one suspect, with its portrait's vector; or why it was left out."""
        began = time.perf_counter()
        try:
            relation, model = self._made(suspect)
        except (LineageError, UnsupportedModelError) as error:
            return [{"suspect": suspect, WHY: str(error)}]
        made = time.perf_counter()
        ours, theirs = self.base_view, WeightView.of_module(model)
        if ours.width == theirs.width:
            found = judge(FINGERPRINTS["score"]().compare(ours, theirs), ours.width)
        else:
            found = between_widths(ours, theirs).judgement
        judged = time.perf_counter()
        row = {
            "suspect": suspect,
            "relation": relation,
            "width": theirs.width,
            "blocks": theirs.depth,
            "vocabulary": theirs.vocabulary,
            **{name: _value(name, ours, theirs) for name in self.options["fingerprints"]},
            "score": found.score,
            "z": found.z,
            "p": found.p_value,
            "verdict": found.verdict,
            "making_s": made - began,
            "seconds": judged - made,
            PORTRAIT: self.portrait(suspect, theirs),
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
        }
        return [row | self._perplexities(suspect, model)]

    @cached_property
    def base_view(self) -> WeightView:
        """The base's weights."""
        return WeightView.of_module(self.loaded.model)

    def portrait(self, suspect: str, view: WeightView) -> list[float]:
        """Return a portrait's vector, a descendant's on the base's tokens; empty: too narrow."""
        own = suspect.startswith("stranger ")
        tokens = None if own else choose_tokens(self.base_view.vocabulary)
        try:
            found = public_file.make(view, suspect, tokens=tokens)
        except LineageError:
            return []
        return [float(x) for x in encoder.vector(found)]

    def _perplexities(self, suspect: str, model: Any) -> Row:
        """Return held-out perplexities of base and suspect, where they read the same tokens."""
        if suspect.startswith("stranger ") or suspect == "vocabulary":
            return {"perplexity_base": None, "perplexity": None}
        base, windows = self._other if suspect == "further-trained" else self._tuning
        return {"perplexity_base": base, "perplexity": self._perplexity(windows, model)}

    @cached_property
    def _tuning(self) -> tuple[float, Windows]:
        return self._measured(read_texts(self.options["text"], self.options["other"]).tuning)

    @cached_property
    def _other(self) -> tuple[float, Windows]:
        return self._measured(read_texts(self.options["text"], self.options["other"]).other)

    def _measured(self, text: str) -> tuple[float, Windows]:
        """Return the base's held-out perplexity and the windows that it was measured on."""
        plan = self._plan
        windows = Windows(self.loaded.tokenizer, text, plan.length, plan.seed)
        return self._perplexity(windows, self.loaded.model), windows

    def _perplexity(self, windows: Windows, model: Any) -> float:
        return windows.perplexity(model, self.options["windows"])

    def _made(self, suspect: str) -> tuple[str, Any]:
        """Return (relation, model) of a suspect."""
        kind, _, name = suspect.partition(" ")
        if kind == "stranger":
            if name != MADE:
                return "independent", load(name, "causal-lm").model
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive_seed(self.config.seed, "lineage-llm"))
                config = self.loaded.model.config
                return "independent", HEADS["causal-lm"].from_config(config).eval()
        if suspect in ("width-pruned", HEALED):
            return "pruned", self._narrow(trained=suspect == HEALED)
        loaded = copy.deepcopy(self.loaded)
        if kind == "map":
            return "function kept", transform(loaded.model, name).model
        if suspect == "blocks-dropped":
            return "pruned", drop_blocks(loaded.model, self.options["drop"])
        recipe, plan = RECIPES[suspect], self._plan
        texts = read_texts(self.options["text"], self.options["other"])
        text = texts.other if suspect == "further-trained" else texts.tuning
        windows = Windows(loaded.tokenizer, text, plan.length, plan.seed)
        recipe.make(loaded, windows, replace(plan, lr=RATES.get(suspect, 1.0) * plan.lr))
        return recipe.relation, loaded.model

    def _narrow(self, *, trained: bool) -> Any:
        """Return the base cut in width, then taught by the whole base where ``trained``."""
        plan, options = self._plan, self.options
        text = read_texts(options["text"], options["other"]).tuning
        windows = Windows(self.loaded.tokenizer, text, plan.length, plan.seed)
        ids = windows.batch(IMPORTANCE_ROWS)
        model = cut_width(self.loaded.model, options["width"], ids)
        if trained:
            plan = replace(plan, steps=options["narrow-steps"], lr=HEALING_RATE * plan.lr)
            train(model, windows, plan, teacher=self.loaded.model)
        return model

    @property
    def _plan(self) -> Training:
        o = self.options
        return Training(max(1, o["steps"]), o["lr"], o["batch"], o["length"], self.config.seed)


def draw_portraits(path: Path, setting: LargeModel, rows: Sequence[Row], size: int) -> list[str]:
    """Draw the base above its descendants, a column per kind of change, and each stranger.

    Returns the picture's name in a list; an empty one for a base too narrow for a portrait.
    """
    base = setting.portrait("base", setting.base_view)
    if not base:
        return []
    drawn = [row for row in rows if row[PORTRAIT]]
    columns = []
    for title, names in (
        ("trained", TRAINED),
        ("cut, rounded", (*UNTRAINED, HEALED)),
        ("mapped", ()),
    ):
        mine = [
            (_label(row, setting.base_view.width), row[PORTRAIT])
            for row in drawn
            if row["suspect"] in names or (not names and row["relation"] == "function kept")
        ]
        if mine:
            columns.append((title, [("base", base), *mine]))
    for row in drawn:
        if row["relation"] == "independent":
            columns.append(("stranger", [(Path(row["suspect"][9:]).name, row[PORTRAIT])]))
    draw_sheet(columns, path, size=size)
    return [path.name]


def _label(row: Row, width: int) -> str:
    """Return a descendant's label, which says where a picture tells nothing of descent."""
    other = "" if row["width"] == width else f" (width {row['width']}: no likeness)"
    return f"{row['suspect'].removeprefix('map ')}{other}"


def _value(name: str, ours: WeightView, theirs: WeightView) -> float | None:
    """Return a fingerprint's value; None where it refuses the pair."""
    try:
        return FINGERPRINTS[name]().compare(ours, theirs).value
    except LineageError:
        return None


def _rounded(row: Row) -> Row:
    shown = {k: f"{row[k]:.3f}" for k in OTHERS if row.get(k) is not None}
    formats = {"score": ".4f", "z": ".1f", "seconds": ".1f"}
    return {**row, **shown, **{name: format(row[name], how) for name, how in formats.items()}}
