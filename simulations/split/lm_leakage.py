"""The kind ``lm-leakage``: how much of a language model's text each attacker reads in split mode.

Whole federated runs over a real transport; the attackers have what crossed, both ways, the initial
model and the announced settings.  ``token_recovery`` is positional, ``text_recovery`` the share of
texts read without an error, ``guess`` the server's own prediction of each token.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from fedsplit.attacks import ATTACKS, Truth, View, make_attack, suited
from fedsplit.attacks.files import parse_budget, public_knowledge, recorded_view
from fedsplit.attacks.transcripts import TRANSCRIPT, read_whole_transcript
from fedsplit.config import RunConfig
from fedsplit.errors import check
from fedsplit.registry import pick
from simulations.core.cells import CellStore, Row, product, run_cells
from simulations.core.owner_samples import owner_samples
from simulations.core.run_folder import RunFolder
from simulations.core.settings import Experiment, read_options, resolved
from simulations.core.tables import make_table, with_interval
from simulations.runtime.local_run import run_in_process
from simulations.split.label_leakage import protected
from simulations.split.transcript_attacks import truth_of
from strategies.base_model import load_base

OPTIONS: dict[str, Any] = {
    "seeds": 1,
    "models": ["../shared/models/gutenberg_llama_seed0"],
    "protections": ["none", "client-head"],
    "transports": ["stream", "messages"],
    "attackers": [],  # of these those that fit what crossed; none: all that fit
    "budget": [],  # ATTACK.FIELD=VALUE
    "samples": 32,
    "public": "",
}


def run(experiment: Experiment, folder: RunFolder, console: Console) -> None:
    """Carry out the experiment; finished cells are kept if it is killed."""
    options = read_options(experiment.options, OPTIONS)
    config = experiment.config
    task = config.model.task
    check(task == "causal-lm", "model.task", task, "causal-lm")
    for name in options["attackers"]:
        pick(ATTACKS, name, "attack")
    parse_budget(options["budget"])
    store = CellStore.open(
        folder, config, options, ("seeds", "models", "protections", "transports")
    )

    def make(model: str, protection: str, transport: str, seed: int) -> list[Row]:
        cell = protected(config, protection, seed)
        cell = replace(
            cell,
            model=replace(cell.model, name=str(resolved(model)), sha256=""),
            session=replace(cell.session, transport=transport),
            output=replace(cell.output, transcript=True, capture=False),
        )
        about = {"model": Path(model).name, "protection": protection, "transport": transport}
        return [about | row for row in run_cell(cell, folder.path / "cell", options)]

    keys = product(
        model=options["models"],
        protection=options["protections"],
        transport=options["transports"],
        seed=range(options["seeds"]),
    )
    console.print(table(run_cells(experiment, folder, console, store, keys, make)))


def run_cell(config: RunConfig, folder: Path, options: dict[str, Any]) -> list[Row]:
    """Run one federation and every attack on tokens that fits what its server has."""
    try:
        config, server = run_in_process(config, folder)
        view, ids = attackers_view(
            config, folder / "server" / TRANSCRIPT, options["samples"], options["public"]
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    budget = parse_budget(options["budget"])
    named = [make_attack(name, config.seed, budget) for name in options["attackers"]]
    rows = []
    for attack in named or suited(view, config.seed, budget):
        if attack.reads != "tokens" or not attack.applies(view):
            continue
        began = time.perf_counter()
        found = attack.run(view, Truth(ids=ids))
        rows.append(
            {
                "seed": config.seed,
                "attacker": attack.name,
                **with_interval("token_recovery", found.success, found.interval),
                **with_interval(
                    "text_recovery", found.text_recovery or 0.0, found.text_interval or (0.0, 1.0)
                ),
                "guess": found.baseline if found.guess is None else found.guess[0],
                "text_guess": None if found.guess is None else found.guess[1],
                "tokens": found.tokens,
                "texts": len(found.per_text),
                "frames_left_out": server["recorded"]["frames_left_out"],
                "seconds": time.perf_counter() - began,
            }
        )
    return rows


def attackers_view(
    config: RunConfig, transcript: Path, samples: int, public: str = ""
) -> tuple[View, list[Tensor]]:
    """Return what the attackers have of a run, and the true ids of the texts in it."""
    owners = owner_samples(config, load_base(config).tokenizer)
    recorded = read_whole_transcript(transcript)
    view, ids = recorded_view(recorded, truth_of(owners), samples, config.seed)
    view.public = public_knowledge(config, public=public)
    return view, ids


def table(rows: list[Row]) -> Table:
    """Return one line per attacker, the share of tokens and of whole texts that it reads."""
    shares = ("token_recovery", "text_recovery", "guess")
    return make_table(
        ("model", "protection", "transport", "attacker", "tokens read", "texts read", "guess"),
        (
            (
                *(row[key] for key in ("model", "protection", "transport", "attacker")),
                *(f"{100 * row[share]:.1f} %" for share in shares),
            )
            for row in rows
        ),
        title="Text read from what crossed",
        left=4,
    )
