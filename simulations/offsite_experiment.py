"""The kind ``offsite-table``: what each way to make an emulator is worth, on one text and schedule.

Offsite-Tuning (arXiv 2302.04870) and ScaleOT (arXiv 2412.09812), their tables' columns.
Centralised, on the union of the owners' text: a federation with one local step per round takes the
same steps (a test of the strategy holds that), so what differs between rows is the emulator alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fedsplit.config import RunConfig
from fedsplit.emulators import Compressor, Material, make_compressor
from fedsplit.emulators.importance import LayerReplace
from fedsplit.emulators.importance_files import Importance, ImportanceSettings
from fedsplit.emulators.lm import mean_loss, pack
from fedsplit.emulators.trial import Tuning, fully_tuned, trial, tuned_in_full
from fedsplit.errors import ConfigError
from fedsplit.models.loading import LoadedModel
from fedsplit.owners.adapter_work import blocks_of
from fedsplit.owners.share import simulated_shares
from fedsplit.privacy.public_text import public_texts
from fedsplit.registry import pick
from fedsplit.seeding import derive_seed
from simulations.cells import Cells, Row
from simulations.progress import RunProgress
from simulations.run_folder import RunFolder
from simulations.settings import Experiment
from strategies.split_tuning_run import load_base

OPTIONS: dict[str, Any] = {
    "seeds": 3,
    "methods": ["ot", "ot-kd", "crash", "gradot", "scaleot", "scaleot-src"],
    "steps": 150,
    "batch": 16,
    "lr": 3e-4,
    "held-out": 64,
    "adapters": 4,
    "alpha": 0.5,
    "beta": 0.5,
    "settle-steps": 0,
    "importance-steps": 400,
    "distil-steps": 400,
    "full": True,
}
LOSSES = ("full_zero_shot", "emulator_zero_shot", "emulator_ft", "plug_in", "adapters_in_full")


def run(experiment: Experiment, folder: RunFolder, console: Console) -> None:
    """Carry out the experiment; finished cells are kept if it is killed.

    Raises:
        FedsplitError: whatever failed, named.
    """
    unknown = experiment.options.keys() - OPTIONS.keys()
    if unknown:
        raise ConfigError(f"options.{sorted(unknown)[0]}: must be one of {', '.join(OPTIONS)}")
    options = {**OPTIONS, **experiment.options}
    for method in options["methods"]:
        pick(METHODS, method, "method")
    config = experiment.config
    flat = config.to_flat()
    folder.write_config({**flat, "options": options})
    cells = Cells(folder.path / "cells.jsonl", {**flat, **options})
    world = World(config, options)
    rows: list[Row] = []
    done, whole = 0, len(options["methods"]) * int(options["seeds"])
    with RunProgress(console) as progress:
        progress.stage("emulators")
        for seed in range(int(options["seeds"])):
            for method in options["methods"]:
                identity = {"method": method, "seed": seed}
                rows += cells.rows(identity, partial(world.cell, method, seed))
                folder.record(about=experiment.about, rows=rows)
                done += 1
                progress.update(done / whole, f"{method}, seed {seed}")
    console.print(table(rows))


@dataclass
class World:
    """What all cells share."""

    config: RunConfig
    options: dict[str, Any]
    _importance: dict[int, tuple[Importance, float]] = field(default_factory=dict)
    _bounds: dict[tuple[int, tuple[int, ...]], float] = field(default_factory=dict)
    _full: dict[int, float] = field(default_factory=dict)
    _loaded: LoadedModel | None = None
    _tokens: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def loaded(self) -> LoadedModel:
        """The base model and its tokenizer."""
        if self._loaded is None:
            self._loaded = load_base(self.config)
        return self._loaded

    @property
    def tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        """The owners' training blocks, their held-out blocks, and public ones, (N, T) each."""
        if self._tokens is None:
            length = self.config.offsite.block
            tokenizer = self.loaded.tokenizer
            shares = simulated_shares(self.config.data, self.config.seed, False)
            parts = [blocks_of(tokenizer, a.texts, b.texts, length) for a, b in shares]
            public = public_texts(
                self.config.offsite.public, docstrings=self.config.data.kind != "docstrings"
            )
            ids = [i for text in public for i in tokenizer(text)["input_ids"]]
            self._tokens = (
                torch.cat([p.train for p in parts]),
                torch.cat([p.test for p in parts])[: int(self.options["held-out"])],
                pack(torch.tensor(ids), length),
            )
        return self._tokens

    def tuning(self, seed: int) -> Tuning:
        """How adapters are tuned: the same for every method."""
        o = self.options
        return Tuning(
            steps=int(o["steps"]), batch_size=int(o["batch"]), lr=float(o["lr"]), seed=seed
        )

    def importance(self, seed: int) -> tuple[Importance, float]:
        """Return the seed's importance run and its seconds; one run serves many emulators."""
        if seed not in self._importance:
            began = time.perf_counter()
            public = self.tokens[2]
            half = max(1, len(public) // 2)
            settings = ImportanceSettings(
                steps=int(self.options["importance-steps"]), seed=derive_seed(seed) % 2**31
            )
            layer_replace = LayerReplace(
                self.loaded.model,
                public[:half],
                public[half:],
                settings,
                base_digest=self.loaded.digest,
            )
            self._importance[seed] = layer_replace.run(), time.perf_counter() - began
        return self._importance[seed]

    def cell(self, method: str, seed: int) -> list[Row]:
        """Return the row of one method and seed."""
        train, held_out, public = self.tokens
        settings = self.tuning(seed)
        made, importance, scored_s = METHODS[method](self, seed)
        material = Material(tokens=public, importance=importance, base_digest=self.loaded.digest)
        model = self.loaded.model
        row, _ = trial(model, made, material, train, held_out, settings, bound=math.nan)
        key = (seed, row.adapters)
        if key not in self._bounds:
            self._bounds[key] = tuned_in_full(model, row.adapters, train, held_out, settings)
        if self.options["full"] and seed not in self._full:
            self._full[seed] = fully_tuned(model, train, held_out, settings)
        nats = {name: getattr(row, name) for name in LOSSES} | {
            "adapters_in_full": self._bounds[key]
        }
        gain = nats["full_zero_shot"] - nats["adapters_in_full"]
        out: Row = {"method": method, "seed": seed}
        out |= {name: math.exp(min(value, 50.0)) for name, value in nats.items()}
        if seed in self._full:
            out["full_ft"] = math.exp(min(self._full[seed], 50.0))
        out |= {
            "closed": (nats["full_zero_shot"] - nats["plug_in"]) / gain,
            "model_privacy_nats": nats["emulator_ft"] - nats["plug_in"],
            "emulator_params": row.emulator_params,
            "build_s": row.build_s + scored_s,
            "trained_params": row.trained_params,
            "adapters": ",".join(map(str, row.adapters)),
            "held_out_tokens": held_out.numel(),
            "zero_shot_check": math.exp(min(mean_loss(model, held_out), 50.0)),
        }
        return [out]


Made = tuple[Compressor, Importance | None, float]


def _ends(world: World) -> dict[str, Any]:
    """Offsite-Tuning's choice: the first and last blocks are A, half of the others are kept."""
    layers = int(world.loaded.model.config.num_hidden_layers)
    count = int(world.options["adapters"])
    half = max(1, count // 2)
    adapters = tuple(sorted({*range(half), *range(layers - (count - half), layers)}))
    if len(adapters) >= layers:
        raise ConfigError(f"options.adapters={count}: must be < {layers} blocks")
    return {"adapters": adapters, "rest": max(1, (layers - len(adapters)) // 2)}


def _ot(world: World, seed: int) -> Made:
    at = _ends(world)
    return make_compressor("layerdrop", adapters=at["adapters"], keep=at["rest"]), None, 0.0


def _ot_kd(world: World, seed: int) -> Made:
    at = _ends(world)
    steps = int(world.options["distil-steps"])
    made = make_compressor(
        "layerdrop", adapters=at["adapters"], keep=at["rest"], distil_steps=steps, seed=seed
    )
    return made, None, 0.0


def _crash(world: World, seed: int) -> Made:
    at = _ends(world)
    return make_compressor("crash", adapters=at["adapters"], clusters=at["rest"]), None, 0.0


def _gradot(world: World, seed: int) -> Made:
    at, beta = _ends(world), float(world.options["beta"])
    return make_compressor("gradot", adapters=at["adapters"], attention=beta, ffn=beta), None, 0.0


def _scaleot(world: World, seed: int, beta: float = 0.0) -> Made:
    importance, seconds = world.importance(seed)
    o = world.options
    made = make_compressor(
        "scaleot",
        n_adapters=int(o["adapters"]),
        alpha=float(o["alpha"]),
        beta=beta,
        settle_steps=int(o["settle-steps"]),
        seed=seed,
    )
    return made, importance, seconds


def _scaleot_src(world: World, seed: int) -> Made:
    return _scaleot(world, seed, float(world.options["beta"]))


METHODS: dict[str, Callable[[World, int], Made]] = {
    "ot": _ot,
    "ot-kd": _ot_kd,
    "crash": _crash,
    "gradot": _gradot,
    "scaleot": _scaleot,
    "scaleot-src": _scaleot_src,
}


def table(rows: list[Row]) -> Table:
    """Return the paper's columns as means over seeds, perplexities."""
    shown = Table(title="held-out perplexity, means over seeds", title_justify="left")
    shown.add_column("method")
    columns = ("full_zero_shot", "full_ft", "emulator_zero_shot", "emulator_ft", "plug_in")
    for name in (*columns, "adapters_in_full", "closed", "emulator_params", "build_s"):
        shown.add_column(name.replace("_", " "), justify="right")
    for method in dict.fromkeys(str(row["method"]) for row in rows):
        mine = [row for row in rows if row["method"] == method]

        def mean(name: str, mine: list[Row] = mine) -> float:
            values = [float(row[name]) for row in mine if row.get(name) is not None]
            return sum(values) / len(values) if values else math.nan

        shown.add_row(
            method,
            *(f"{mean(name):.2f}" for name in (*columns, "adapters_in_full")),
            f"{100 * mean('closed'):.0f} %",
            f"{mean('emulator_params') / 1e6:.2f} M",
            f"{mean('build_s'):.1f}",
        )
    return shown
