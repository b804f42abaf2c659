"""``bench split``: how fast split training is beside the same work in one process.

Every way does the same steps: the same texts, batch and trained parameters.  The centralised figure
is taken before, between and after the others, because the speed of a shared machine drifts; each
ratio is against the centralised runs beside it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional

from fedsplit.config import RunConfig, Scalar
from fedsplit.models.anatomy import probe
from fedsplit.models.splitting.halves import split
from fedsplit.owners.split.owner import SplitOwner
from fedsplit.owners.split.schedule import train_steps
from fedsplit.owners.split.settings import SplitSettings
from fedsplit.privacy import OwnerSecret, SamplePerturber, build
from fedsplit.wire.codecs import CODECS
from fedsplit.wire.frames import Frame, Kind, encode
from simulations.bench.figures import JsonPath, Overrides, publish
from simulations.core.owner_samples import OwnerSamples, owner_samples
from simulations.core.settings import load_experiment
from simulations.core.tables import make_table
from simulations.runtime.federated import deploy, simulate
from simulations.runtime.machine import machine
from simulations.split.centralised import Step, padded
from strategies.base_model import load_base
from strategies.split_tuning.optimisation import Optimisation

OWNERS = 4
NODES = 2


def run(console: Console, json_path: JsonPath = None, set_: Overrides = None) -> dict[str, Any]:
    """Measure steps per second of split training beside the same work in one process."""
    experiment = load_experiment("bench-split", set_ or ())
    config = replace(experiment.config, data=replace(experiment.config.data, owners=OWNERS))
    threads = config.output.threads or int(machine()["cores"])
    torch.set_num_threads(threads)
    tokenizer = load_base(config).tokenizer
    owners = owner_samples(config, tokenizer)
    figures: dict[str, Any] = {"machine": machine(), "threads": threads}
    anchors: list[float] = []

    def anchor() -> None:
        anchors.append(centralised(config, owners))
        console.print(f"  centralised: {anchors[-1]:.2f} steps/s")

    with tempfile.TemporaryDirectory(prefix="fedsplit-bench-") as folder:
        # A deployment takes the same cohort step from fewer owners with larger batches.
        batch, few = config.train.batch_size * OWNERS // NODES, min(config.train.max_steps or 8, 8)
        fewer: dict[str, Scalar] = {"data.owners": NODES, "train.batch-size": batch}
        messages: dict[str, Scalar] = {"session.transport": "messages", "train.max-steps": few}
        ways = {
            "simulation": (simulate, config),
            "deployment": (deploy, RunConfig.from_flat(config.to_flat() | fewer)),
            "messages": (simulate, RunConfig.from_flat(config.to_flat() | messages)),
        }
        anchor()
        for name, (carry_out, settings) in ways.items():
            console.print(f"{name} ...")
            began = time.perf_counter()
            _, server = carry_out(settings, Path(folder) / name)
            wall = time.perf_counter() - began
            anchor()
            figures[name] = _row(server, wall, (anchors[-2] + anchors[-1]) / 2)
            console.print(f"  {name}: {figures[name]['steps_per_s']:.2f} steps/s")
    figures["centralised"] = {"steps_per_s": sum(anchors) / len(anchors), "runs": anchors}
    figures["bytes_per_token"] = bytes_per_token(config, owners)
    return publish(console, json_path, figures, [_table(config, figures)])


def _row(server: dict[str, Any], wall_s: float, anchor: float) -> dict[str, Any]:
    rounds = [r["train"] for r in server["rounds"]]
    row: dict[str, Any] = {}
    for part, some in (("", rounds), ("first_epoch_", rounds[:1]), ("later_epochs_", rounds[1:])):
        if some:
            rate = sum(r["steps"] for r in some) / sum(r["seconds"] for r in some)
            row |= {f"{part}steps_per_s": rate, f"{part}ratio": rate / anchor}
    return {
        **row,
        "compute_share": sum(r["compute_s"] for r in rounds) / sum(r["seconds"] for r in rounds),
        "steps": sum(r["steps"] for r in rounds),
        "wall_s": wall_s,
        "peak_server_bytes": server.get("peak_rss_bytes"),
    }


def centralised(config: RunConfig, owners: Sequence[OwnerSamples]) -> float:
    """Return steps/s of ordinary training: the whole model, the same parameters trained."""
    loaded = load_base(config)
    model = loaded.model.train()
    anatomy = probe(model)
    above = {id(p) for block in anatomy.blocks[config.split.k :] for p in block.parameters()}
    base = {id(p) for p in model.base_model.parameters()}
    below = {id(p) for block in anatomy.blocks[: config.split.k] for p in block.parameters()}
    below |= {id(p) for p in anatomy.input_embeddings.parameters()}
    head = [p for p in model.parameters() if id(p) not in base]
    body = [p for p in model.parameters() if id(p) in above]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in [*head, *body]:
        parameter.requires_grad_(True)
    optimisation = Optimisation(body, head, config.train)
    batches = {
        s.name: train_steps(len(s.train), config.train, config.seed, s.name, 1)[0] for s in owners
    }
    steps: list[Step] = [
        [(s.train, [int(i) for i in batches[s.name][at]]) for s in owners]
        for at in range(min(map(len, batches.values())))
    ]
    began, counted = 0.0, 0
    for number, step in enumerate(steps):
        if number == 2:  # the first two fill caches and allocate
            began = time.perf_counter()
        _whole_step(model, step, optimisation, number / len(steps))
        counted += number >= 2
    return counted / (time.perf_counter() - began)


def _whole_step(model: Any, step: Step, optimisation: Optimisation, progress: float) -> None:
    ids, mask = padded(step)
    labels = torch.cat([own.targets_of(slots)[1] for own, slots in step])
    optimisation.zero_grad()
    loss = functional.cross_entropy(model(input_ids=ids, attention_mask=mask).logits, labels)
    torch.autograd.backward([loss])
    optimisation.step(progress)


def bytes_per_token(config: RunConfig, owners: Sequence[OwnerSamples]) -> dict[str, float]:
    """Return bytes on the wire per token sent, frames' headers included, for each codec."""
    bottom, _ = split(load_base(config).model, config.split.k, verify=False)
    samples = owners[0].train
    batches = train_steps(len(samples), config.train, config.seed, owners[0].name, 1)[0][:8]
    tokens = sum(int(samples.ids[int(i)].shape[0]) for batch in batches for i in batch)
    found = {}
    for codec in CODECS:
        perturber = SamplePerturber(build("none"), OwnerSecret.for_simulation(0, "bench"), "bench")
        settings = SplitSettings("train", False, codec, "fp32")
        owner = SplitOwner(bottom, samples, batches, perturber, settings)
        frames = owner.handle(Frame(Kind.START, {"window": len(batches)}))
        sizes = [len(encode(Frame(f.kind, f.header, f.encode()), 0, 1 << 30)) for f in frames]
        found[codec] = sum(sizes) / tokens
    return found


def _table(config: RunConfig, figures: dict[str, Any]) -> Table:
    titles = {
        "simulation": f"simulation, {OWNERS} owners",
        "deployment": f"deployment, {NODES} SuperNodes, TLS",
        "messages": "Flower messages alone",
    }
    rows: list[tuple[str, ...]] = [
        ("centralised, one process", f"{figures['centralised']['steps_per_s']:.2f}")
    ]
    for name, title in titles.items():
        row = figures[name]
        later = row.get("later_epochs_ratio")
        ratios = (row["ratio"], row["first_epoch_ratio"], later)
        shown = ("" if ratio is None else f"{ratio:.2f} x" for ratio in ratios)
        computes = f"{100 * row['compute_share']:.0f} % of the time"
        rows.append((title, f"{row['steps_per_s']:.2f}", *shown, computes))
    sizes = ", ".join(f"{k} {v:.0f}" for k, v in figures["bytes_per_token"].items())
    return make_table(
        ("", "steps/s", "of centralised", "first epoch", "later epochs", "server computes"),
        rows,
        title=f"Split training, {config.model.name.partition(':')[2] or config.model.name}, "
        f"k = {config.split.k}, {config.train.batch_size * OWNERS} texts a step; bytes per token "
        f"sent, frames included: {sizes}",
    )
