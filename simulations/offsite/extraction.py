"""The kind ``offsite-extraction``: how long each emulator withstands the owner who holds it.

For each way to make an emulator, an owner tunes adapters on private text, as in ``offsite-table``;
then owners of growing knowledge train the rest of the emulator back toward the full model on
public text (:mod:`fedsplit.attacks.extraction.attack`).  Rows hold the share of the gap closed at
each part of the budget, on held-out public text and on the owner's own task.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fedsplit.attacks import Truth, View, make_attack
from fedsplit.attacks.extraction.attack import Gap, Task
from fedsplit.data import docstrings_are_public
from fedsplit.emulators import Emulator, Material, adapter_state
from fedsplit.emulators.lm import pack
from fedsplit.emulators.planning.trial import tune
from fedsplit.errors import ConfigError, check
from fedsplit.evaluation.perplexity import text_ids
from fedsplit.privacy.public_text import public_texts
from fedsplit.registry import pick
from fedsplit.seeding import derive_seed
from simulations.core.cells import Cells, Row
from simulations.core.progress import RunProgress
from simulations.core.run_folder import RunFolder
from simulations.core.settings import Experiment
from simulations.offsite.extraction_plot import closed_plot
from simulations.offsite.table import METHODS, World
from simulations.offsite.table import OPTIONS as TABLE_OPTIONS

OPTIONS: dict[str, Any] = {
    **TABLE_OPTIONS,
    "methods": ["ot", "scaleot", "scaleot-src"],
    "seeds": 1,
    "attacks": ["control", "lm", "queries", "queries-regrow"],
    "budget": [0, 25, 50, 100, 200],
    "attack-batch": 8,
    "attack-lr": 3e-4,
    "attack-text": "",
    "attack-held-out": "",
    "windows": 128,
}
CONTROL = "control"  # the full model tuned on the same text: what is adaptation, not extraction
# Attacker -> does the full model answer, does the emulator get its full size back.
ATTACKERS: dict[str, tuple[bool, bool]] = {
    CONTROL: (False, False),
    "lm": (False, False),
    "lm-regrow": (False, True),
    "queries": (True, False),
    "queries-regrow": (True, True),
}


def run(experiment: Experiment, folder: RunFolder, console: Console) -> None:
    """Carry out the experiment; finished cells are kept if it is killed.

    Raises:
        FedsplitError: whatever failed, named.
    """
    options = checked_options(experiment.options)
    config = experiment.config
    flat = config.to_flat()
    folder.write_config({**flat, "options": options})
    # The choice of rows and the number of seeds change no row.
    same = {k: v for k, v in options.items() if k not in ("methods", "attacks", "seeds", "full")}
    cells = Cells(folder.path / "cells.jsonl", {**flat, **same})
    world = Attacked(World(config, same, folder.path, cells), options)
    rows: list[Row] = []
    todo = [
        {"method": method, "seed": seed, "attack": attack}
        for seed in range(int(options["seeds"]))
        for method in options["methods"]
        for attack in options["attacks"]
    ]
    with RunProgress(console) as progress:
        progress.stage("attacks")
        for done, cell in enumerate(todo, 1):
            rows += cells.rows(cell, partial(world.cell, **cell))
            folder.record(about=experiment.about, rows=rows)
            shown = f"{cell['method']}, {cell['attack']}, seed {cell['seed']}"
            progress.update(done / len(todo), shown)
    console.print(table(rows))
    folder.record(plots=[closed_plot(folder.path / "extraction.png", rows)])


def checked_options(given: Any) -> dict[str, Any]:
    """Return all options.

    Raises:
        ConfigError: an unknown one, or a value out of its range.
    """
    unknown = given.keys() - OPTIONS.keys()
    if unknown:
        raise ConfigError(f"options.{min(unknown)}: must be one of {', '.join(OPTIONS)}")
    options = {**OPTIONS, **given}
    for method in options["methods"]:
        pick(METHODS, method, "method")
    for attack in options["attacks"]:
        pick(ATTACKERS, attack, "attack")
    budget = options["budget"]
    good = bool(budget) and all(isinstance(s, int) and s >= 0 for s in budget)
    check(good and max(budget) >= 1, "options.budget", budget, "steps >= 0, one of them >= 1")
    check(int(options["windows"]) >= 2, "options.windows", options["windows"], ">= 2")
    return options


@dataclass
class Attacked:
    """What all cells share: texts, and each method's emulator with the owner's tuned adapters."""

    world: World
    options: dict[str, Any]
    _sent: dict[tuple[str, int], tuple[Emulator, dict[str, Tensor]]] = field(default_factory=dict)
    _texts: tuple[Tensor, Tensor] | None = None

    @property
    def texts(self) -> tuple[Tensor, Tensor]:
        """The attacker's blocks (N, T), and held-out public ids (n,)."""
        if self._texts is None:
            tokenizer = self.world.loaded.tokenizer
            length = self.world.config.offsite.block
            own = str(self.options["attack-text"]) or self.world.config.offsite.public
            docstrings = docstrings_are_public(self.world.config.data.kind)
            ids = text_ids(tokenizer, public_texts(own, docstrings=docstrings))
            if self.options["attack-held-out"]:
                path = Path(str(self.options["attack-held-out"]))
                held_out = text_ids(tokenizer, public_texts(str(path)))
            else:
                cut = len(ids) - len(ids) // 10
                ids, held_out = ids[:cut], ids[cut:]
            self._texts = pack(ids, length), held_out[: self._measured]
        return self._texts

    @property
    def _measured(self) -> int:
        return (int(self.options["windows"]) + 1) * (self.world.config.offsite.block // 2)

    def sent(self, method: str, seed: int) -> tuple[Emulator, dict[str, Tensor]]:
        """Return a method's emulator as it is sent, and the adapters that the owner tuned in it."""
        key = (method, seed)
        if key not in self._sent:
            train, _, public = self.world.tokens
            made, importance, _ = METHODS[method](self.world, seed)
            loaded = self.world.loaded
            material = Material(tokens=public, importance=importance, base_digest=loaded.digest)
            emulator = made.build(loaded.model, material)
            before = adapter_state(emulator)
            parameters = list(emulator.adapter_parameters().values())
            tune(emulator.model, parameters, train, self.world.tuning(seed))
            tuned = adapter_state(emulator)
            named = emulator.adapter_parameters()
            with torch.no_grad():
                for name, tensor in before.items():
                    named[name].copy_(tensor)
            self._sent = {key: (emulator, tuned)}  # one at a time in memory
        return self._sent[key]

    def cell(self, method: str, seed: int, attack: str) -> list[Row]:
        """Return one row for each part of the budget."""
        public, held_out = self.texts
        emulator, tuned = self.sent(method, seed)
        queries, regrow = ATTACKERS[attack]
        budget = sorted(set(self.options["budget"]))
        work = self.world.tokens[1].flatten()[: self._measured]
        made = make_attack(
            "extraction",
            derive_seed(seed, "extraction") % 2**31,
            steps=budget[-1],
            batch_size=int(self.options["attack-batch"]),
            lr=float(self.options["attack-lr"]),
            queries=queries,
            regrow=regrow,
            bf16=bool(self.options["bf16"]),
            window=self.world.config.offsite.block,
            marks=tuple(budget),
            control=attack == CONTROL,
        )
        base = self.world.loaded.model
        view = View(emulator=emulator, text=public, teacher=base if queries else None)
        result = made.run(view, Truth(gap=Gap(base, held_out, Task(tuned, work))))
        about: Row = {
            "method": method,
            "attack": attack,
            "seed": seed,
            "emulator_params": emulator.parameter_count(),
        }
        return [{**about, **row} for row in result.extra["rows"]]


def table(rows: list[Row]) -> Table:
    """The shares closed with the whole budget, means over seeds; gaps in nats a token."""
    tokens = max((int(r["tokens"]) for r in rows), default=0)
    title = f"share of the gap (nats) closed with {tokens} tokens"
    shown = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("method", "attack"):
        shown.add_column(name, no_wrap=True)
    for name in ("gap", "closed", "95 % (%)", "of control", "task closed"):
        shown.add_column(name, justify="right", min_width=len(name.split()[-1]))
    for method, attack in dict.fromkeys((r["method"], r["attack"]) for r in rows):
        mine = [r for r in rows if (r["method"], r["attack"]) == (method, attack)]
        last = [r for r in mine if r["steps"] == max(m["steps"] for m in mine)]
        shown.add_row(
            str(method),
            str(attack),
            f"{_mean(last, 'public_emulator') - _mean(last, 'public_full'):.3f}",
            _share(last, "public_closed"),
            " ".join(_interval(r) for r in last),
            of_control(last, rows),
            _share(last, "task_closed"),
        )
    return shown


def _mean(rows: list[Row], key: str) -> float:
    return sum(float(r[key]) for r in rows) / len(rows)


def _share(rows: list[Row], key: str) -> str:
    values = [float(r[key]) for r in rows if r[key] is not None]
    return f"{100 * sum(values) / len(values):.0f} %" if values else "no gap"


def of_control(mine: list[Row], rows: list[Row]) -> str:
    """Return what the attack gained over what the full model gained by the same training.

    Both from the emulator's loss on public text: adaptation is in both, so a share below 1 is what
    the emulator still withholds.
    """
    key = ("method", "seed", "steps")
    control = {tuple(r[k] for k in key): r for r in rows if r["attack"] == CONTROL}
    shares = []
    for row in mine:
        twin = control.get(tuple(row[k] for k in key))
        if twin is not None and row["attack"] != CONTROL:
            best = row["public_emulator"] - twin["public_attacked"]
            shares.append((row["public_emulator"] - row["public_attacked"]) / best)
    return f"{100 * sum(shares) / len(shares):.0f} %" if shares else ""


def _interval(row: Row) -> str:
    if row["public_low"] is None:
        return ""
    return f"{100 * row['public_low']:.0f}-{100 * row['public_high']:.0f}"
