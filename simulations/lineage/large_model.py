"""The kind ``lineage-llm``: one large model, its descendants and strangers, judged one by one.

A cell is one suspect: it is made from the base, compared by the verdict's fingerprint (aligned
products; for another width, in the directions that both embeddings know) and dropped, so that two
models are in memory at a time and a killed experiment goes on with the next suspect.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from fedsplit.commands.compare import between_widths
from fedsplit.errors import check
from fedsplit.fingerprints import FINGERPRINTS
from fedsplit.fingerprints.evasion.transforms import TRANSFORMS, transform
from fedsplit.fingerprints.gate.verdict import judge
from fedsplit.fingerprints.view import WeightView
from fedsplit.models.anatomy import probe
from fedsplit.models.loading import HEADS, LoadedModel, load
from fedsplit.models.splitting.structure import with_blocks
from fedsplit.seeding import derive_seed
from simulations.core.cells import CellStore, Row, run_cells
from simulations.core.run_folder import RunFolder
from simulations.core.setting import ExperimentSetting
from simulations.core.settings import Experiment, read_options
from simulations.core.tables import make_table
from simulations.lineage.descendants import RATES, RECIPES, Training, Windows, read_texts
from simulations.runtime.machine import limited_threads

OPTIONS: dict[str, Any] = {
    "steps": 20,  # of those descendants that are trained; 0: they are left out
    "lr": 1e-4,
    "batch": 4,
    "length": 64,
    "transforms": ["rotation", "vo_maps"],  # function-preserving maps of the base
    "width": 0.75,  # share of the residual directions and hidden units that a cut keeps
    "drop": 4,  # every so many-th block is dropped
    "strangers": "",  # comma-separated names of independent models; one of the base's shape is made
    "text": "",
    "other": "",
    "threads": 1,
}
TRAINED = ("fine-tuned", "lora", "further-trained", "vocabulary")
UNTRAINED = ("pruned", "quantised-8", "quantised-4", "width-pruned", "blocks-dropped")
MADE = "same shape, new weights"


def run(experiment: Experiment, folder: RunFolder, console: Console) -> None:
    """Carry out the experiment; finished suspects are kept if it is killed."""
    options = read_options(experiment.options, OPTIONS)
    check(options["steps"] >= 0, "options.steps", options["steps"], ">= 0")
    check(0 < options["width"] < 1, "options.width", options["width"], "in (0, 1)")
    check(options["drop"] >= 2, "options.drop", options["drop"], ">= 2")
    for name in options["transforms"]:
        check(name in TRANSFORMS, "options.transforms", name, f"one of {', '.join(TRANSFORMS)}")
    choosing = ("transforms", "strangers", "threads")
    store = CellStore.open(folder, experiment.config, options, choosing)
    setting = LargeModel(experiment.config, {**store.options, **options}, folder.path, store)
    trained = TRAINED if options["steps"] else ()
    others = [name.strip() for name in options["strangers"].split(",") if name.strip()]
    keys = [{"suspect": name} for name in (*UNTRAINED, *trained)]
    keys += [{"suspect": f"map {name}"} for name in options["transforms"]]
    keys += [{"suspect": f"stranger {name}"} for name in (MADE, *others)]
    with limited_threads(options["threads"]):
        rows = run_cells(experiment, folder, console, store, keys, setting.cell)
    columns = ("suspect", "relation", "width", "score", "z", "verdict", "seconds", "peak_mb")
    shown = ([row[c] for c in columns] for row in map(_rounded, rows))
    console.print(
        make_table(columns, shown, title=f"Against {experiment.config.model.name}", left=2)
    )


@dataclass
class LargeModel(ExperimentSetting):
    """The base, and what is made of it."""

    def cell(self, suspect: str) -> list[Row]:
        """Return the row of one suspect."""
        began = time.perf_counter()
        base = self._load(self.config.model.name)
        relation, model = self._made(suspect)
        made = time.perf_counter()
        ours, theirs = WeightView.of_module(base.model), WeightView.of_module(model)
        if ours.width == theirs.width:
            found = judge(FINGERPRINTS["score"]().compare(ours, theirs), ours.width)
        else:
            found = between_widths(ours, theirs).judgement
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return [
            {
                "suspect": suspect,
                "relation": relation,
                "width": theirs.width,
                "blocks": theirs.depth,
                "score": found.score,
                "z": found.z,
                "p": found.p_value,
                "verdict": found.verdict,
                "making_s": made - began,
                "seconds": time.perf_counter() - made,
                "peak_mb": peak / 1e6,
            }
        ]

    def _load(self, name: str) -> LoadedModel:
        sha256 = self.config.model.sha256 if name == self.config.model.name else ""
        return load(name, "causal-lm", expected_sha256=sha256 or None)

    def _made(self, suspect: str) -> tuple[str, Any]:
        """Return (relation, model) of a suspect."""
        kind, _, name = suspect.partition(" ")
        if kind == "stranger":
            if name != MADE:
                return "independent", self._load(name).model
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive_seed(self.config.seed, "lineage-llm"))
                config = self._load(self.config.model.name).model.config
                return "independent", HEADS["causal-lm"].from_config(config).eval()
        loaded = self._load(self.config.model.name)
        if kind == "map":
            return "function kept", transform(loaded.model, name).model
        if suspect in CUTS:
            share = self.options["width"] if suspect == "width-pruned" else self.options["drop"]
            with torch.no_grad():
                return "pruned", CUTS[suspect](loaded.model, share)
        recipe, plan = RECIPES[suspect], self._plan
        texts = read_texts(self.options["text"], self.options["other"])
        text = texts.other if suspect == "further-trained" else texts.tuning
        windows = Windows(loaded.tokenizer, text, plan.length, plan.seed)
        recipe.make(loaded, windows, replace(plan, lr=RATES.get(suspect, 1.0) * plan.lr))
        return recipe.relation, loaded.model

    @property
    def _plan(self) -> Training:
        o = self.options
        return Training(max(1, o["steps"]), o["lr"], o["batch"], o["length"], self.config.seed)


def cut_width(model: Any, share: float) -> Any:
    """Return a model of fewer residual directions and hidden units, as Sheared LLaMA and Minitron.

    The directions that the embeddings use most are kept, and each block's hidden units of the
    largest weights; heads stay.  Of LLaMA's layout: gated, without biases.
    """
    config = type(model.config).from_dict(model.config.to_dict())
    whole, inner = config.hidden_size, config.intermediate_size
    config.head_dim = getattr(config, "head_dim", None) or whole // config.num_attention_heads
    config.hidden_size, config.intermediate_size = int(whole * share), int(inner * share)
    anatomy = probe(model)
    embeddings: Tensor = anatomy.input_embeddings.weight  # type: ignore[assignment]
    keep = _largest(embeddings.square().sum(0), config.hidden_size)
    state = {}
    for name, weight in model.state_dict().items():
        part = weight
        block = name.rpartition(".mlp.")[0]
        if block:
            units = model.get_submodule(f"{block}.mlp").down_proj.weight.square().sum(0)
            kept = _largest(units, config.intermediate_size)
            part = part[:, kept] if "down_proj" in name else part[kept]
        into = part.dim() == 1 or "o_proj" in name or "down_proj" in name
        state[name] = (part[keep] if into else part[:, keep]).clone()
    narrow = HEADS["causal-lm"].from_config(config)
    narrow.load_state_dict(state)
    return narrow.eval()


def _largest(values: Tensor, count: int) -> Tensor:
    found: Tensor = values.topk(count).indices.sort().values
    return found


def drop_blocks(model: Any, every: int) -> Any:
    """Return a model without every ``every``-th of its blocks."""
    blocks = probe(model).blocks
    kept = [i for i in range(len(blocks)) if i % every != every - 1]
    short: Any = with_blocks(model, [blocks[i] for i in kept], kept)
    return short.eval()


CUTS: dict[str, Callable[[Any, Any], Any]] = {
    "width-pruned": cut_width,
    "blocks-dropped": drop_blocks,
}


def _rounded(row: Row) -> Row:
    formats = {"score": ".4f", "z": ".1f", "seconds": ".1f", "peak_mb": ".0f"}
    return {**row, **{name: format(row[name], how) for name, how in formats.items()}}
