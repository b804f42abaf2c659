"""The kind ``offsite-extraction``: how long each emulator withstands the owner who holds it.

For each way to make an emulator, an owner tunes adapters on private text, as in ``offsite-table``;
then owners of growing knowledge train the rest of the emulator back toward the full model on
public text (:mod:`fedsplit.attacks.extraction.attack`).  Rows hold the share of the gap closed at
each part of the budget, on held-out public text and on the owner's own task.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fedsplit.attacks import Truth, View, make_attack
from fedsplit.attacks.extraction.attack import Gap, Task
from fedsplit.data import docstrings_are_public
from fedsplit.emulators import Emulator, adapter_state
from fedsplit.emulators.lm import pack
from fedsplit.emulators.planning.trial import tune
from fedsplit.errors import ConfigError, check
from fedsplit.evaluation.perplexity import text_ids
from fedsplit.privacy.public_text import public_texts
from fedsplit.registry import pick
from fedsplit.seeding import derive_seed
from simulations.core.cells import CellStore, Row, product, run_cells
from simulations.core.plots import draw_if_possible
from simulations.core.run_folder import RunFolder
from simulations.core.settings import Experiment, read_options
from simulations.core.tables import grouped, make_table, mean
from simulations.offsite.emulator_table import METHODS, SELECTING
from simulations.offsite.emulator_table import OPTIONS as TABLE_OPTIONS
from simulations.offsite.plots import closed_plot
from simulations.offsite.setting import PREPARED, OffsiteSetting

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
    """Carry out the experiment; finished cells are kept if it is killed."""
    options = checked_options(experiment.options)
    selecting = (*SELECTING, "attacks")
    store = CellStore.open(folder, experiment.config, options, selecting)
    prepared = options[PREPARED]
    setting = ExtractionSetting(experiment.config, store.options, folder.path, store, prepared)
    methods, attacks = options["methods"], options["attacks"]
    keys = product(seed=range(options["seeds"]), method=methods, attack=attacks)
    rows = run_cells(experiment, folder, console, store, keys, setting.cell)
    console.print(table(rows))
    path = folder.path / "extraction.png"
    draw_if_possible(console, path, closed_plot, rows)
    folder.record(plots=[path.name])


def checked_options(given: Any) -> dict[str, Any]:
    """Return all options.

    Raises:
        ConfigError: an unknown one, or a value out of its range.
    """
    options = read_options(given, OPTIONS)
    for method in options["methods"]:
        pick(METHODS, method, "method")
    for attack in options["attacks"]:
        pick(ATTACKERS, attack, "attack")
    budget = options["budget"]
    good = bool(budget) and all(isinstance(s, int) and s >= 0 for s in budget)
    check(good and max(budget) >= 1, "options.budget", budget, "steps >= 0, one of them >= 1")
    check(options["windows"] >= 2, "options.windows", options["windows"], ">= 2")
    return options


@dataclass
class ExtractionSetting(OffsiteSetting):
    """The attacker's texts, and each method's emulator with the owner's tuned adapters."""

    _sent: dict[tuple[str, int], tuple[Emulator, dict[str, Tensor]]] = field(default_factory=dict)

    @cached_property
    def texts(self) -> tuple[Tensor, Tensor]:
        """The attacker's blocks (N, T), and held-out public ids (n,)."""
        tokenizer = self.loaded.tokenizer
        own = self.options["attack-text"] or self.config.offsite.public
        docstrings = docstrings_are_public(self.config.data.kind)
        ids = text_ids(tokenizer, public_texts(own, docstrings=docstrings))
        if path := self.options["attack-held-out"]:
            held_out = text_ids(tokenizer, public_texts(path))
        else:
            cut = len(ids) - len(ids) // 10
            ids, held_out = ids[:cut], ids[cut:]
        return pack(ids, self.config.offsite.block), held_out[: self._measured]

    @property
    def _measured(self) -> int:
        return int((self.options["windows"] + 1) * (self.config.offsite.block // 2))

    def sent(self, method: str, seed: int) -> tuple[Emulator, dict[str, Tensor]]:
        """Return a method's emulator as it is sent, and the adapters that the owner tuned in it."""
        key = (method, seed)
        if key not in self._sent:
            made, importance, _ = METHODS[method](self, seed)
            emulator = made.build(self.loaded.model, self.material(importance))
            before, named = adapter_state(emulator), emulator.adapter_parameters()
            tune(emulator.model, list(named.values()), self.private[0], self.tuning(seed))
            tuned = adapter_state(emulator)
            with torch.no_grad():
                for name, tensor in before.items():
                    named[name].copy_(tensor)
            self._sent = {key: (emulator, tuned)}  # one at a time in memory
        return self._sent[key]

    def cell(self, method: str, seed: int, attack: str) -> list[Row]:
        """Return one row for each part of the budget."""
        public, held_out = self.texts
        held = self.private[1]
        if not torch.equal(held.ids, held.labels):
            raise ConfigError(
                f"data.kind={self.config.data.kind!r}: must be plain text; the gap is measured on "
                "a stream of tokens, which conversations are not"
            )
        work = held.ids.flatten()[: self._measured]
        emulator, tuned = self.sent(method, seed)
        queries, regrow = ATTACKERS[attack]
        budget = sorted(set(self.options["budget"]))
        made = make_attack(
            "extraction",
            derive_seed(seed, "extraction") % 2**31,
            steps=budget[-1],
            batch_size=self.options["attack-batch"],
            lr=self.options["attack-lr"],
            queries=queries,
            regrow=regrow,
            bf16=self.options["bf16"],
            window=self.config.offsite.block,
            marks=tuple(budget),
            control=attack == CONTROL,
        )
        base = self.loaded.model
        view = View(emulator=emulator, text=public, teacher=base if queries else None)
        result = made.run(view, Truth(gap=Gap(base, held_out, Task(tuned, work))))
        about: Row = {"method": method, "attack": attack, "seed": seed}
        about |= {"emulator_params": emulator.parameter_count()}
        return [{**about, **row} for row in result.extra["rows"]]


def table(rows: list[Row]) -> Table:
    """Return the shares closed with the whole budget, means over seeds; gaps in nats a token."""
    tokens = max((int(r["tokens"]) for r in rows), default=0)
    shown = []
    for (method, attack), mine in grouped(rows, "method", "attack").items():
        most = max(m["steps"] for m in mine)
        last = [r for r in mine if r["steps"] == most]
        gap = mean(last, "public_emulator") - mean(last, "public_full")
        intervals = " ".join(map(_interval, last))
        closed, task = (_share(last, f"{name}_closed") for name in ("public", "task"))
        shown.append(
            (method, attack, f"{gap:.3f}", closed, intervals, of_control(last, rows), task)
        )
    return make_table(
        ("method", "attack", "gap", "closed", "95 % (%)", "of control", "task closed"),
        shown,
        title=f"share of the gap (nats) closed with {tokens} tokens",
        left=2,
        narrow=True,
    )


def _share(rows: list[Row], key: str) -> str:
    values = [float(r[key]) for r in rows if r[key] is not None]
    return f"{100 * fmean(values):.0f} %" if values else "no gap"


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
    return f"{100 * fmean(shares):.0f} %" if shares else ""


def _interval(row: Row) -> str:
    if row["public_low"] is None:
        return ""
    return f"{100 * row['public_low']:.0f}-{100 * row['public_high']:.0f}"
