"""The kind ``lm-peers``: this project's attackers beside TAG, LAMP and BiSR on one transcript.

Every attacker reads the same ``transcript.safetensors`` and leaves its ids in
``guesses/NAME.safetensors``; one scorer reads those files.  Tokens that have a target are scored:
all but each text's first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedsplit.attacks import Inversion, View, make_attack
from fedsplit.attacks.inversion.embeddings import soft_embeddings
from fedsplit.attacks.inversion.learned import represent
from fedsplit.attacks.scoring import score_tokens
from fedsplit.attacks.transcripts import TRANSCRIPT
from fedsplit.config import RunConfig
from fedsplit.errors import check
from fedsplit.models.modes import frozen
from fedsplit.seeding import torch_generator
from simulations.core.cells import CellStore, Row, product, run_cells
from simulations.core.run_folder import RunFolder
from simulations.core.settings import Experiment, read_options
from simulations.core.tables import make_table, with_interval
from simulations.peers.gradient_matching import Crossed, Inverter, bisr, lamp, tag, teach
from simulations.runtime.local_run import run_in_process
from simulations.split.label_leakage import protected
from simulations.split.lm_leakage import attackers_view

OPTIONS: dict[str, Any] = {
    "seeds": 1,
    "protections": ["client-head"],
    "ours": ["closed_form", "gradient_map", "matching", "joint"],
    "peers": ["tag", "lamp", "bisr"],
    "samples": 4,
    "public-texts": 300,
    "inverter-epochs": 5,
}
Guesses = list[Tensor]


def run(experiment: Experiment, folder: RunFolder, console: Console) -> None:
    """Carry out the experiment; finished cells are kept if it is killed."""
    options = read_options(experiment.options, OPTIONS)
    config = experiment.config
    task = config.model.task
    check(task == "causal-lm", "model.task", task, "causal-lm")
    for name in options["peers"]:
        check(name in PEERS, "options.peers", name, f"one of {', '.join(PEERS)}")
    store = CellStore.open(folder, config, options, ("seeds", "protections"))

    def make(protection: str, seed: int) -> list[Row]:
        cell = protected(config, protection, seed)
        rows = run_cell(cell, folder.path / "cells" / f"{protection}-{seed}", options)
        return [{"protection": protection, "seed": seed} | row for row in rows]

    keys = product(protection=options["protections"], seed=range(options["seeds"]))
    console.print(table(run_cells(experiment, folder, console, store, keys, make)))


def run_cell(config: RunConfig, folder: Path, options: dict[str, Any]) -> list[Row]:
    """Run one federation, let every attacker read its transcript, and score what they left."""
    flat = {**config.to_flat(), "output.transcript": True, "output.capture": False}
    config, _ = run_in_process(RunConfig.from_flat(flat), folder)
    view, truth = attackers_view(config, folder / "server" / TRANSCRIPT, options["samples"])
    guesses = folder / "guesses"
    guesses.mkdir(exist_ok=True)
    seconds = {}
    for name in options["ours"]:
        attack = make_attack(name, config.seed)
        if attack.applies(view):
            began = time.perf_counter()
            _leave(guesses / f"{name}.safetensors", attack.read(view).ids)  # type: ignore[attr-defined]
            seconds[name] = time.perf_counter() - began
    peers = _Peers(view, config.seed, options)
    for name in options["peers"]:
        began = time.perf_counter()
        with frozen(view.public.bottom), frozen(view.public.model):
            _leave(guesses / f"{name}.safetensors", PEERS[name](peers))
        seconds[name] = time.perf_counter() - began
    return scored(guesses, view, truth, options["ours"], seconds)


def scored(
    folder: Path,
    view: View,
    truth: Sequence[Tensor],
    ours: Sequence[str],
    seconds: dict[str, float],
) -> list[Row]:
    """Return a row for every file of guesses, and how it differs from the project's best."""
    special = view.public.special_ids
    covers = [torch.arange(len(ids)) > 0 for ids in truth]
    right: dict[str, Tensor] = {}
    rows: list[Row] = []
    for name in seconds:
        ids = _taken(folder / f"{name}.safetensors")
        found = Inversion([x[:, None] for x in ids], seconds[name], covers)
        result = score_tokens(name, found, list(truth), special_ids=special)
        right[name] = torch.cat([(a == b)[1:] for a, b in zip(ids, truth, strict=True)])
        rows.append(
            {
                "attacker": name,
                "whose": "ours" if name in ours else "peer",
                **with_interval("token_recovery", result.success, result.interval),
                "text_recovery": result.text_recovery,
                "tokens": result.tokens,
                "texts": len(result.per_text),
                "seconds": seconds[name],
            }
        )
    mine = [row for row in rows if row["whose"] == "ours"]
    best = max(mine, key=lambda row: float(row["token_recovery"]))["attacker"] if mine else None
    for row in rows:
        other = right[str(row["attacker"])]
        row["best_of_ours"] = best
        if best is not None:
            row["it_alone"] = int((other & ~right[best]).sum())
            row["best_alone"] = int((right[best] & ~other).sum())
    return rows


def _leave(path: Path, ids: Sequence[Tensor]) -> None:
    save_file({str(i): x.contiguous() for i, x in enumerate(ids)}, path)


def _taken(path: Path) -> list[Tensor]:
    held = load_file(path)
    return [held[str(i)] for i in range(len(held))]


class _Peers:
    """What the peers are given: the same transcript and the same public material."""

    def __init__(self, view: View, seed: int, options: dict[str, Any]) -> None:
        self.view, self.seed, self._options = view, seed, options
        head = view.public.head
        check(head is not None, "head", head, "linear, for the peers")
        assert head is not None
        self.texts = [
            Crossed(
                hidden=steps[0].output.float(),
                gradient=steps[0].gradient.float() / (len(steps[0].gradient) - 1),
                rows=rows.float(),
                head=head.weight,
                model=view.public.model,
                bottom=self._states,
            )
            for rows, steps in zip(view.rows, view.steps, strict=True)
        ]

    def _states(self, soft: Tensor) -> Tensor:
        mask = torch.ones(1, len(soft), dtype=torch.long)
        with soft_embeddings(self.view.public.embedding) as slot:
            slot.append(soft[None])
            states: Tensor = self.view.public.bottom(torch.zeros_like(mask), mask)[0]
        return states

    def generator(self, name: str) -> torch.Generator:
        """Return the generator of one peer's draws."""
        return torch_generator(self.seed, "peers", name)

    def inverter(self) -> Inverter:
        """Return BiSR's inverter, taught on public texts behind the public bottom."""
        public = self.view.public
        ids = [torch.as_tensor(x) for x in public.public_ids if len(x) > 3]
        ids = ids[: self._options["public-texts"]]
        torch.manual_seed(self.seed)
        states = represent(public.bottom, ids)
        epochs = self._options["inverter-epochs"]
        return teach([x.float() for x in states], ids, public.vocab, epochs=epochs)


def _bisr(peers: _Peers) -> Guesses:
    inverter = peers.inverter()
    return [bisr(seen, inverter) for seen in peers.texts]


PEERS: dict[str, Callable[[_Peers], Guesses]] = {
    "tag": lambda peers: [tag(seen, peers.generator("tag")) for seen in peers.texts],
    "lamp": lambda peers: [lamp(seen, peers.generator("lamp")) for seen in peers.texts],
    "bisr": _bisr,
}


def table(rows: list[Row]) -> Table:
    """Return one line per attacker."""
    return make_table(
        ("protection", "attacker", "whose", "tokens read", "texts read", "alone", "best alone"),
        (
            (
                *(row[key] for key in ("protection", "attacker", "whose")),
                *(f"{100 * row[key]:.1f} %" for key in ("token_recovery", "text_recovery")),
                row.get("it_alone"),
                row.get("best_alone"),
            )
            for row in rows
        ),
        title="One transcript, read by this project's attackers and by published ones",
        left=3,
    )
