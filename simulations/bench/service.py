"""``bench service``: one session server and many owners on the loopback interface.

Two things are measured.  *Serving*: every owner asks one text after another, as ``fedsplit
predict`` does; the same owners ask the same texts of a server that answers one by one and of one
that lets texts which wait together share a forward, by turns, so that a machine whose speed drifts
does not favour either.  *Training*: a cohort of as many owners takes steps together, beside the
same owners one after another.

The owners of the first part are threads of other processes and replay what a bottom made (see
:mod:`simulations.bench.replayed_owners`); those of the second are whole, and share the server's
process.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from typer import Option

from fedsplit.config import RunConfig
from fedsplit.errors import RunError, check
from fedsplit.models.splitting.halves import split
from fedsplit.wire.authentication import SessionAuthenticator
from fedsplit.wire.messages import SessionOffer
from fedsplit.wire.serving import MODE
from simulations.bench.figures import JsonPath, publish
from simulations.core.owner_samples import owner_samples
from simulations.core.tables import make_table
from simulations.runtime.local_run import run_in_process
from simulations.runtime.machine import machine
from strategies.base_model import load_base
from strategies.serving.run import build_inference_server
from strategies.sessions.transports import StreamTransport
from strategies.telemetry.status import quantile

RUN = 1
PROCESSES = 2
WAIT_S = 900.0
WAYS = ("one by one", "batched")


def settings(owners: int) -> RunConfig:
    """Return the settings that both parts start from."""
    flat: dict[str, Any] = {
        "strategy": "serving",
        "model.labels": 8,
        "model.max-tokens": 48,
        "model.dropout": 0.0,
        "split.k": 0,
        "train.batch-size": 1,
        "data.kind": "docstrings",
        "data.owners": owners,
        "data.partition": "iid",
        "data.limit": 24 * owners,
        "lineage.gate": "off",
        "output.evaluate-every": 0,
        "session.deadline-s": WAIT_S,
    }
    return RunConfig.from_flat(flat)


def run(
    console: Console,
    json_path: JsonPath = None,
    *,
    owners: Annotated[int, Option(help="connected at once")] = 50,
    steps: Annotated[int, Option(help="texts that each owner asks in one repeat")] = 20,
    repeats: Annotated[int, Option(help="of each way of serving, by turns")] = 3,
    training: Annotated[int, Option(help="steps of a training cohort; 0 = none")] = 0,
) -> dict[str, Any]:
    """Measure a session server with many owners: steps per second, latency, memory, batching."""
    check(1 <= owners <= 200, "owners", owners, "in [1, 200], one session each")
    check(1 <= steps <= 10_000, "steps", steps, "in [1, 10000]")
    check(1 <= repeats <= 100, "repeats", repeats, "in [1, 100]")
    config = settings(owners)
    figures: dict[str, Any] = {"machine": machine(), "owners": owners, "steps": steps}
    with tempfile.TemporaryDirectory(prefix="fedsplit-bench-") as folder:
        rows = Path(folder) / "rows.safetensors"
        figures["texts"] = represent(config, rows)
        found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        for number in range(repeats):
            for way in WAYS if number % 2 == 0 else WAYS[::-1]:
                most = 1 if way == "one by one" else config.serving.max_batch
                one = replace(config, serving=replace(config.serving, max_batch=most))
                found[way].append(serve(one, rows, owners, steps))
                console.print(f"  {way}: {found[way][-1]['steps_per_s']:.1f} steps/s")
        figures["serving"] = {way: together(each) for way, each in found.items()}
        if training:
            figures["training"] = {
                schedule: train(config, schedule, training, Path(folder) / schedule)
                for schedule in ("sequential", "parallel")
            }
    return publish(console, json_path, figures, [table(figures)])


def represent(config: RunConfig, path: Path) -> dict[str, Any]:
    """Write the bottom's representations of the texts, and return how many and how long."""
    loaded = load_base(config)
    bottom, _ = split(loaded.model, config.split.k)
    owners = owner_samples(config, loaded.tokenizer)
    rows: dict[str, torch.Tensor] = {}
    with torch.inference_mode():
        for ids in [ids for owner in owners for ids in owner.train.ids][:512]:
            rows[str(len(rows))] = bottom(ids[None])[0].clone()
    save_file(rows, path)
    lengths = [int(r.shape[0]) for r in rows.values()]
    return {"count": len(rows), "mean_tokens": statistics.fmean(lengths)}


def serve(config: RunConfig, rows: Path, owners: int, steps: int) -> dict[str, Any]:
    """Let all owners ask one server; return its speed, their waiting and its memory."""
    server = build_inference_server(config)
    authenticator = SessionAuthenticator(RUN)
    transport = StreamTransport(
        authenticator,
        host="127.0.0.1",
        port=0,
        tls=None,
        max_frame_bytes=config.session.max_frame_mb << 20,
        on_bytes=None,
    )
    transport.serve(server)
    try:
        before = resident()
        offer = SessionOffer(RUN, 0, 0, MODE, "stream", "", transport.address, digest=server.digest)
        with _owners(offer, authenticator, rows, owners, steps) as children:
            connected = resident()
            with sampled() as peak:
                for child in children:
                    print("go", file=child.stdin, flush=True)
                results = [json.loads(_hear(child)) for child in children]
    finally:
        transport.close()
        server.close()
    errors = [error for result in results for error in result["errors"]]
    if errors:
        raise RunError(f"bench service: {len(errors)} of {owners} owners failed: {errors[0]}")
    latencies = [latency for result in results for latency in result["latencies"]]
    return {
        "steps_per_s": len(latencies) / max(result["seconds"] for result in results),
        "latencies": latencies,
        "texts_per_forward": server.batcher.report.texts / max(1, server.batcher.report.forwards),
        "bytes_per_owner": (connected - before) / owners,
        "busy_bytes_per_owner": (max(peak) - before) / owners,
    }


@contextmanager
def _owners(
    offer: SessionOffer, authenticator: SessionAuthenticator, rows: Path, owners: int, steps: int
) -> Iterator[list[subprocess.Popen[str]]]:
    """Start the owners' processes; inside the block all sessions are open."""
    children: list[subprocess.Popen[str]] = []
    nodes = range(1, owners + 1)
    plain = {key: value for key, value in asdict(offer).items() if key != "ca"}
    try:
        for number in range(PROCESSES):
            tokens = {n: authenticator.issue(n, 0, MODE) for n in nodes[number::PROCESSES]}
            child = subprocess.Popen(
                [sys.executable, "-m", "simulations.bench.replayed_owners"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            children.append(child)
            told = {"offer": plain, "tokens": tokens, "rows": str(rows), "steps": steps}
            print(json.dumps(told), file=child.stdin, flush=True)
        for child in children:
            if (line := _hear(child)) != "ready":
                raise RunError(f"bench service: owners said {line!r}, must say ready")
        yield children
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
            child.wait()


def _hear(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    line = child.stdout.readline().strip()
    if not line:
        raise RunError(f"bench service: the owners' process ended, exit code {child.wait()}")
    return line


def resident() -> int:
    """Return this process's resident bytes."""
    return int(psutil.Process().memory_info().rss)


@contextmanager
def sampled(every_s: float = 0.1) -> Iterator[list[int]]:
    """Collect the resident bytes while the block runs."""
    found = [resident()]
    over = threading.Event()

    def look() -> None:
        while not over.wait(every_s):
            found.append(resident())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def together(repeats: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one way's figures over its repeats: medians, and quantiles of all latencies."""
    latencies = [latency for one in repeats for latency in one["latencies"]]
    names = [name for name in repeats[0] if name != "latencies"]
    middle = {name: statistics.median(one[name] for one in repeats) for name in names}
    spread = [one["steps_per_s"] for one in repeats]
    quantiles = {f"p{share}_s": quantile(latencies, share / 100) for share in (50, 99)}
    return {**middle, **quantiles, "all_steps_per_s": spread, "n": len(latencies)}


def train(config: RunConfig, schedule: str, steps: int, folder: Path) -> dict[str, Any]:
    """Train with every owner connected at once; the speed is what the server's own page says."""
    began = time.perf_counter()
    one = replace(
        config,
        strategy="split-tuning",
        train=replace(config.train, rounds=1, max_steps=steps),
        session=replace(config.session, schedule=schedule, wave_wait_s=WAIT_S),
        output=replace(config.output, save=False),
    )
    logging.disable(logging.WARNING)  # fifty owners without a policy say so fifty times
    try:
        _, server = run_in_process(one, folder)
    finally:
        logging.disable(logging.NOTSET)
    row = server["rounds"][0]["train"]
    page = json.loads((folder / "server" / "progress.json").read_text())
    return {
        "owner_steps_per_s": row["samples"] / row["seconds"],
        "steps": row["steps"],
        "p50_s": page["step_seconds"]["p50"],
        "p99_s": page["step_seconds"]["p99"],
        "wall_s": time.perf_counter() - began,
    }


def table(figures: dict[str, Any]) -> Table:
    """Return the figures as a table."""
    rows = []
    for way, row in figures["serving"].items():
        idle, busy = (row[key] / 2**20 for key in ("bytes_per_owner", "busy_bytes_per_owner"))
        waits = (f"{1000 * row[key]:.0f}" for key in ("p50_s", "p99_s"))
        memory = f"{idle:.2f} (busy {busy:.2f})"
        together = f"{row['texts_per_forward']:.1f}"
        rows.append(
            (f"serving, {way}", f"{row['steps_per_s']:.1f} texts", *waits, together, memory)
        )
    for schedule, row in figures.get("training", {}).items():
        waits = (f"{1000 * row[key]:.0f}" if row[key] else "" for key in ("p50_s", "p99_s"))
        speed = f"{row['owner_steps_per_s']:.1f} owners' steps"
        rows.append((f"training, {schedule}", speed, *waits))
    return make_table(
        ("", "a second", "p50 ms", "p99 ms", "texts per forward", "MiB/owner"),
        rows,
        title=f"{figures['owners']} owners, {figures['texts']['mean_tokens']:.0f} tokens a text",
    )
