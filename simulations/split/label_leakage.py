"""The kind ``label-leakage``: private labels read off what owners really sent, by protection.

Whole federated runs; every frame that the server received is kept, and the attacker has those
frames, what :mod:`fedsplit.attacks.labels.leakage` says beside each attack, and the true labels of
a few rows.  Li et al., ICLR 2022, arXiv 2102.08504 (norm and direction attacks).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from fedsplit.attacks.labels.leakage import LabelLeakage, labels_from_direction
from fedsplit.attacks.scoring import wilson_interval
from fedsplit.config import RunConfig
from fedsplit.errors import ConfigError, RunError, check
from fedsplit.seeding import torch_generator
from fedsplit.wire.codecs import decode_rows
from fedsplit.wire.frames import Frame, Kind, decode
from simulations.core.cells import Cells, Row
from simulations.core.run_folder import RunFolder
from simulations.core.settings import Experiment
from simulations.core.shares import OwnerShare, owner_shares
from simulations.runtime.local_grid import LocalGrid
from simulations.runtime.local_run import run_in_process
from strategies.split_tuning.run import load_base

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
    """Carry out the experiment; finished cells are kept if it is killed.

    Raises:
        FedsplitError: whatever failed, named.
    """
    unknown = experiment.options.keys() - OPTIONS.keys()
    if unknown:
        raise ConfigError(f"options.{sorted(unknown)[0]}: must be one of {', '.join(OPTIONS)}")
    options = {**OPTIONS, **experiment.options}
    config = experiment.config
    check(config.model.labels == 2, "model.labels", config.model.labels, "2 (two-class attacks)")
    folder.write_config({**config.to_flat(), "options": options})
    cells = Cells(folder.path / "cells.jsonl", {**config.to_flat(), "known": options["known"]})
    rows: list[Row] = []
    jobs = [(p, s) for p in options["protections"] for s in range(int(options["seeds"]))]
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("runs", total=len(jobs))
        for protection, seed in jobs:
            progress.update(task, description=f"{protection}, seed {seed}")
            cell = protected(config, protection, seed)
            rows += cells.rows(
                {"protection": protection, "seed": seed},
                partial(run_cell, cell, folder.path / "cell", int(options["known"])),
            )
            folder.record(about=experiment.about, rows=rows)
            progress.advance(task)
    print_rows(console, rows)


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
    return RunConfig.from_flat(flat)


def run_cell(config: RunConfig, folder: Path, known: int) -> list[Row]:
    """Run one federation and every attack on what its server received."""
    began = time.perf_counter()
    try:
        config, server = run_in_process(config, folder)
        shares = owner_shares(config, load_base(config).tokenizer)
        nodes = LocalGrid(config, config.data.owners).nodes
        recorded = read_capture(
            folder / "server" / "capture", {n: shares[i] for n, i in nodes.items()}
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    last = [r["evaluate"]["metrics"] for r in server["rounds"] if "evaluate" in r][-1]
    labels = config.labels
    setting = {
        "randomised-response": f"epsilon={labels.epsilon:g}",
        "marvell": f"noise-power={labels.noise_power:g}",
    }.get(labels.method, "")
    rows = []
    for attack, found in attack_all(recorded, labels.client_head, known, config.seed).items():
        rows.append(
            {
                "protection": labels.protection,
                "setting": setting,
                "seed": config.seed,
                "attack": attack,
                **found,
                "accuracy": last["accuracy"],
                "test_samples": last["num-examples"],
                "seconds": time.perf_counter() - began,
            }
        )
    return rows


def read_capture(folder: Path, shares: Mapping[int, OwnerShare]) -> Recorded:
    """Put the recorded gradients of all owners' training samples together.

    Args:
        folder: one file of frames per node, session after session.
        shares: node -> its owner's samples; their labels are for scoring.

    Raises:
        RunError: nothing was recorded.
    """
    first: dict[tuple[int, int], Tensor] = {}
    whole: dict[tuple[int, int], Tensor] = {}
    for path in sorted(folder.glob("*-train.bin")):
        node = int(path.name.partition("-")[0])
        batches: dict[int, list[int]] = {}
        for frame in frames(path):
            if frame.kind is Kind.BATCH:
                batches[frame["step"]] = list(frame["slots"])
            elif frame.kind is Kind.GRAD:
                gradients = decode_rows(frame.body, tuple(frame["shape"]), frame["codec"])
                slots = batches[frame["step"]]
                for slot, row in zip(slots, gradients, strict=True):
                    row = row.double() * len(slots)  # of the sample's own loss
                    first.setdefault((node, slot), row)
                    whole[node, slot] = whole.get((node, slot), torch.zeros_like(row)) + row
    if not first:
        raise RunError(f"{folder}: must hold recorded gradients")
    order = sorted(first)
    truth = []
    for node, slot in order:
        labels = shares[node].train.labels
        assert labels is not None, "the experiment is about classes"
        truth.append(int(labels[slot]))
    return Recorded(
        torch.stack([first[k] for k in order]),
        torch.stack([whole[k] for k in order]),
        torch.tensor(truth),
    )


def frames(path: Path) -> Iterator[Frame]:
    """Yield the frames of one recorded session after another."""
    data = path.read_bytes()
    at = 0
    while at < len(data):
        length = int.from_bytes(data[at : at + 8], "little")
        yield decode(data[at + 8 : at + 8 + length], length)
        at += 8 + length


def labels_from_norm(gradients: Tensor, known: Mapping[int, int]) -> Tensor:
    """Return two-class labels by gradient norm: one threshold, fitted to >= 2 ``known`` rows."""
    norms = gradients.norm(dim=1)
    mine = norms[list(known)]
    labels = torch.tensor(list(known.values()))
    best, guess = -1, torch.zeros(len(norms), dtype=torch.int64)
    levels = mine.sort().values
    for threshold in ((levels[1:] + levels[:-1]) / 2).tolist():
        for above in (0, 1):
            found = torch.where(mine >= threshold, above, 1 - above)
            right = int((found == labels).sum())
            if right > best:
                best, guess = right, torch.where(norms >= threshold, above, 1 - above)
    return guess


def attack_all(
    recorded: Recorded, client_head: bool, known: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Return each attack's leaked share: after one pass, after all of them, the larger of both."""
    n = len(recorded.truth)
    generator = torch_generator(seed, "label-leakage", "known")
    given = {int(i): int(recorded.truth[i]) for i in torch.randperm(n, generator=generator)[:known]}
    attacks: dict[str, Callable[[Tensor], Tensor]] = {
        "norm": lambda rows: labels_from_norm(rows, given),
        "direction": lambda rows: labels_from_direction(rows, given),
    }
    if not client_head:
        attacks = {"sign": LabelLeakage("logits").infer, **attacks}
    scored = torch.ones(n, dtype=torch.bool)
    scored[list(given)] = False
    truth = recorded.truth[scored]
    result: dict[str, dict[str, Any]] = {}
    for name, attack in attacks.items():
        once = float((attack(recorded.first)[scored] == truth).double().mean())
        whole = float((attack(recorded.whole)[scored] == truth).double().mean())
        leaked = max(once, whole)
        low, high = wilson_interval(leaked, len(truth))
        result[name] = {
            "leaked": leaked,
            "leaked_low": low,
            "leaked_high": high,
            "leaked_one_pass": once,
            "leaked_all_passes": whole,
            "baseline": int(torch.bincount(truth).max()) / len(truth),
            "samples": len(truth),
        }
    return result


def print_rows(console: Console, rows: list[Row]) -> None:
    """Print means over seeds, one line per protection: its strongest attack beside its accuracy."""
    table = Table(title="Labels recovered from what the server received", title_justify="left")
    for column in ("protection", "setting", "attack", "leaked", "guessing", "accuracy", "runs"):
        justify = "left" if column in ("protection", "setting", "attack") else "right"
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    groups: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in rows:
        by_attack = groups.setdefault((row["protection"], row["setting"]), {})
        by_attack.setdefault(row["attack"], []).append(row)
    for (protection, setting), by_attack in groups.items():
        name = max(by_attack, key=lambda a: _mean(by_attack[a], "leaked"))
        found = by_attack[name]
        shares = (f"{100 * _mean(found, k):.1f} %" for k in ("leaked", "baseline", "accuracy"))
        table.add_row(protection, setting, name, *shares, str(len(found)))
    console.print(table)


def _mean(rows: list[Row], column: str) -> float:
    return sum(float(r[column]) for r in rows) / len(rows)
