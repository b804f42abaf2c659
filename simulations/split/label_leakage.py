"""The kind ``label-leakage``: private labels read off what owners really sent, by protection.

Whole federated runs; every frame that the server received is kept, and the attacker has those
frames, what :mod:`fedsplit.attacks.labels.leakage` says beside each attack, and the true labels of
a few rows.  Li et al., ICLR 2022, arXiv 2102.08504 (norm and direction attacks).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fedsplit.attacks import Truth, View, make_attack
from fedsplit.attacks.recorded_frames import read_capture
from fedsplit.attacks.transcripts import Transcript
from fedsplit.config import RunConfig
from fedsplit.errors import ConfigError, RunError, check
from fedsplit.privacy.labels.table import head_at_owner, parts_of
from fedsplit.seeding import torch_generator
from fedsplit.settings import read_settings
from simulations.core.cells import CellStore, Row, product, run_cells
from simulations.core.owner_samples import OwnerSamples, owner_samples
from simulations.core.run_folder import RunFolder
from simulations.core.settings import Experiment, read_options
from simulations.core.tables import grouped, make_table, mean, with_interval
from simulations.runtime.local_grid import LocalGrid
from simulations.runtime.local_run import run_in_process
from strategies.base_model import load_base

# Protections with their parameter, as `--set options.protections` may name them.
PROTECTIONS = [
    "none",
    "client-head",
    "randomised-response:epsilon=1",
    "randomised-response:epsilon=3",
    "marvell:noise-power=4",
    "max-norm",
    "client-head+randomised-response:epsilon=1",
    "client-head+marvell:noise-power=4",
]
OPTIONS: dict[str, Any] = {"seeds": 3, "protections": PROTECTIONS, "known": 8}


@dataclass(frozen=True)
class Recorded:
    """What the server received about labels, sample by sample.

    Attributes:
        first: gradients of the first pass over the data, (N, d).
        whole: each sample's gradients summed over all passes, (N, d).
        truth: private labels, (N,); for scoring, and the attacker's few known ones.
    """

    first: Tensor
    whole: Tensor
    truth: Tensor


def run(experiment: Experiment, folder: RunFolder, console: Console) -> None:
    """Carry out the experiment; finished cells are kept if it is killed."""
    options = read_options(experiment.options, OPTIONS)
    config = experiment.config
    check(config.model.labels == 2, "model.labels", config.model.labels, "2 (two-class attacks)")
    store = CellStore.open(folder, config, options, ("seeds", "protections"))

    def make(protection: str, seed: int) -> list[Row]:
        cell = protected(config, protection, seed)
        return run_cell(cell, folder.path / "cell", options["known"])

    keys = product(protection=options["protections"], seed=range(options["seeds"]))
    console.print(table(run_cells(experiment, folder, console, store, keys, make)))


def protected(config: RunConfig, protection: str, seed: int) -> RunConfig:
    """Return ``config`` with a protection such as ``marvell:noise-power=4``, and its own seed.

    Raises:
        ConfigError: an unknown protection or parameter, or a value out of range.
    """
    name, _, parameters = protection.partition(":")
    flat = {**config.to_flat(), "labels.protection": name, "seed": config.seed + seed}
    for parameter in filter(None, parameters.split(",")):
        key, _, value = parameter.partition("=")
        try:
            flat[f"labels.{key}"] = value == "true" if key == "debias" else float(value)
        except ValueError:
            raise ConfigError(f"labels.{key}={value!r}: must be a number") from None
    flat |= {"output.capture": True, "output.transcript": False}
    return read_settings(flat)


def run_cell(config: RunConfig, folder: Path, known: int) -> list[Row]:
    """Run one federation and every attack on what its server received."""
    began = time.perf_counter()
    try:
        config, server = run_in_process(config, folder)
        shares = owner_samples(config, load_base(config).tokenizer)
        nodes = LocalGrid(config, config.data.owners).nodes
        recorded = recorded_of(
            read_capture(folder / "server" / "capture"), [shares[nodes[n]] for n in sorted(nodes)]
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    last = [r["evaluate"]["metrics"] for r in server["rounds"] if "evaluate" in r][-1]
    labels = config.labels
    protection, at_owner = parts_of(labels.protection)[-1], head_at_owner(labels.protection)
    about = {"protection": labels.protection, "setting": protection.label(labels)}
    held = {"accuracy": last["accuracy"], "test_samples": last["num-examples"]}
    return [
        {**about, "seed": config.seed, "attack": attack, **found, **held}
        | {"seconds": time.perf_counter() - began}
        for attack, found in attack_all(recorded, at_owner, known, config.seed).items()
    ]


def recorded_of(transcript: Transcript, shares: Sequence[OwnerSamples]) -> Recorded:
    """Put the recorded gradients of all owners' training samples together.

    ``shares`` are the owners' samples in the order of their nodes; their labels are for scoring.

    Raises:
        RunError: nothing was recorded.
    """
    first, whole, truth = [], [], []
    for share in shares:
        key = (share.name, "train")
        for slot in sorted(transcript.gradients[0].get(key, {})) if transcript.gradients else ():
            passes = [p[key][slot].double() for p in transcript.gradients if slot in p.get(key, {})]
            first.append(passes[0])
            whole.append(sum(passes[1:], passes[0]))
            assert share.train.labels is not None, "the experiment is about classes"
            truth.append(int(share.train.labels[slot]))
    if not first:
        raise RunError("capture: must hold recorded gradients")
    return Recorded(torch.stack(first), torch.stack(whole), torch.tensor(truth))


def attack_all(
    recorded: Recorded, client_head: bool, known: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Return each attack's leaked share: after one pass, after all of them, the larger of both."""
    n = len(recorded.truth)
    generator = torch_generator(seed, "label-leakage", "known")
    given = {int(i): int(recorded.truth[i]) for i in torch.randperm(n, generator=generator)[:known]}
    methods = {"norm": "norm", "direction": "direction"}
    if not client_head:
        methods = {"sign": "logits", **methods}
    truth = Truth(labels=recorded.truth)
    result: dict[str, dict[str, Any]] = {}
    for name, method in methods.items():
        attack = make_attack("label_leakage", method=method)
        once, whole = (
            attack.run(View(gradients=list(rows.unbind(0)), known=given), truth)
            for rows in (recorded.first, recorded.whole)
        )
        most = max(once, whole, key=lambda found: found.success)
        result[name] = {
            **with_interval("leaked", most.success, most.interval),
            "leaked_one_pass": once.success,
            "leaked_all_passes": whole.success,
            "baseline": most.baseline,
            "samples": most.tokens,
        }
    return result


def table(rows: list[Row]) -> Table:
    """Return means over seeds: each protection's strongest attack beside its accuracy."""
    shown = []
    for (protection, setting), mine in grouped(rows, "protection", "setting").items():
        attacks = grouped(mine, "attack")
        found = max(attacks.values(), key=lambda rows: mean(rows, "leaked"))
        shares = (f"{100 * mean(found, k):.1f} %" for k in ("leaked", "baseline", "accuracy"))
        shown.append((protection, setting, found[0]["attack"], *shares, len(found)))
    return make_table(
        ("protection", "setting", "attack", "leaked", "guessing", "accuracy", "runs"),
        shown,
        title="Labels recovered from what the server received",
        left=3,
    )
