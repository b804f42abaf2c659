"""docs/deploy.md, run: TLS, node authentication, three owners, and what must be refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedsplit.config import RunConfig
from fedsplit.deploy.keys import make_keys, make_node
from fedsplit.owners.app_digest import digest_of_app
from fedsplit.owners.data_source import simulated_shares
from fedsplit.owners.ledger.chain import read_ledger
from fedsplit.privacy.secret import OwnerSecret
from simulations.runtime.child_processes import Child, ProcessGroup, answers, free_port, wait_until
from simulations.runtime.environment import base_environment, thread_environment
from simulations.runtime.local_run import run_in_process
from simulations.runtime.watchdog import MARK_VARIABLE
from tests.deploy.runbook import DEPLOY, ROOT, Step, copy_with, put_in, steps
from tests.tiny_models import save_texts, save_tiny_bert, save_tiny_llama

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]
OWNERS = ("hospital", "bank", "insurer")
SERVER = "model-owner"
SEED = 0
START_S = 180.0
# An app that nobody reviewed: it would run code of its own on the owner's machine when imported.
CHANGED_CLIENT = """
from pathlib import Path
from flwr.clientapp import ClientApp

Path({mark!r}).write_text("ran")
app = ClientApp()
"""
CHANGED_SERVER = """
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    content = RecordDict({"c": ConfigRecord({"x": 1})})
    nodes = list(grid.get_node_ids())
    messages = [Message(content, dst_node_id=n, message_type="query.who") for n in nodes]
    for reply in grid.send_and_receive(messages, timeout=120):
        print("REPLY", reply.error.reason if reply.has_error() else "content", flush=True)
"""


class Federation:
    """Folders, processes and placeholders of the runbook's parties, all on the loopback."""

    def __init__(self, root: Path, processes: ProcessGroup) -> None:
        self.root, self.processes = root, processes
        self.ports = (str(free_port()), str(free_port()))
        self.children: dict[str, Child] = {}
        names = {name: f"owner-{i}" for i, name in enumerate(OWNERS)}
        shared = {
            "fed.example.org": "localhost",
            "192.0.2.10": "127.0.0.1",
            "0.0.0.0": "127.0.0.1",
            "9092": self.ports[0],
            "9093": self.ports[1],
        }
        server = self.folder(SERVER)
        self.places = {SERVER: {**shared, **names, "/srv/fedsplit": str(server)}}
        for name in OWNERS:
            home = self.folder(name)
            self.places[name] = {
                **shared,
                "hospital": names[name],  # what the template says; each owner writes its own
                "/etc/fedsplit": str(home / "etc"),
                "/var/lib/fedsplit": str(home / "state"),
                "/opt/fedsplit": str(home / "opt"),
                "/srv/data/notes.jsonl": str(home / "data"),
            }
            (home / "etc").mkdir()
            copy_with(DEPLOY, home / "opt" / "deploy", self.places[name])
        self.app = server / "app"
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "strategies", self.app / "strategies", ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", self.app)
        copy_with(DEPLOY, self.app / "deploy", self.places[SERVER])

    def folder(self, actor: str) -> Path:
        path = self.root / actor
        path.mkdir(exist_ok=True)
        return path

    def environment(self, actor: str) -> dict[str, str]:
        threads = thread_environment(1, patient=actor != SERVER)
        home = {"HOME": str(self.folder(actor)), "PYTHONPATH": str(ROOT)}
        env = base_environment(self.processes.mark, {**threads, **home})
        return {k: v for k, v in env.items() if not k.startswith("FEDSPLIT_") or k == MARK_VARIABLE}

    def hand_over(self) -> None:
        """What the parties give each other by other ways than the network."""
        server = self.folder(SERVER)
        for index, name in enumerate(OWNERS):
            etc = self.folder(name) / "etc"
            given = server / "keys" / "owners" / f"owner-{index}"
            if given.exists() and not (etc / "keys").exists():
                shutil.copytree(given, etc / "keys")
            if (etc / "keys").exists() and not (etc / "keys" / "ca.pem").exists():
                shutil.copy(server / "keys" / "ca.pem", etc / "keys")
                shutil.copy(etc / "keys" / "node.pub", server / f"owner-{index}.pub")
            if (server / "app.fab").exists():
                shutil.copy(server / "app.fab", etc)

    def do(self, step: Step) -> list[str]:
        """Run one block for each of its actors; return what they printed."""
        told = []
        for actor in step.actors:
            self.hand_over()
            text = put_in(step.commands, self.places[actor])
            if step.stays:
                self.stay(actor, text)
            else:
                told.append(self.shell(actor, text))
        if step.stays:
            for actor in step.actors:
                self.wait_for(actor)
        return told

    def shell(self, actor: str, text: str, code: int = 0) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=self.folder(actor),
            env=self.environment(actor),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == code, f"{actor}: {text}\n{done.stdout[-4000:]}"
        return done.stdout

    def stay(self, actor: str, text: str, name: str = "") -> Child:
        child = self.processes.add(
            Child(
                name or actor,
                ["bash", "-euo", "pipefail", "-c", text],
                env=self.environment(actor),
                cwd=self.folder(actor),
                log_path=self.root / f"{name or actor}.log",
            )
        )
        self.children[name or actor] = child
        return child

    def log(self, name: str) -> str:
        path = self.root / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def wait_for(self, actor: str) -> None:
        child = self.children[actor]
        ca = self.folder(SERVER) / "keys" / "ca.pem"
        url = f"https://localhost:{self.ports[0]}/health"

        def ready() -> bool:
            up = answers(url, ca) if actor == SERVER else "SuperNode ID:" in self.log(actor)
            return up or not child.alive

        wait_until(ready, START_S, 0.2)
        if not child.alive or not ready():
            raise child.failure("did not start")

    def settings(self, name: str) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for key, value in tomllib.loads((self.folder(SERVER) / name).read_text()).items():
            inner = value if isinstance(value, dict) else None
            flat |= {f"{key}.{k}": v for k, v in inner.items()} if inner else {key: value}
        return flat

    def ledger(self, owner: str) -> bytes:
        path = self.folder(owner) / "state" / "ledger.jsonl"
        return path.read_bytes() if path.exists() else b""


def prepare_material(federation: Federation) -> dict[str, Any]:
    """Make models, the whole data set, each owner's share of it, and the noise secrets."""
    server = federation.folder(SERVER)
    save_tiny_bert(server / "models" / "classifier", positions=64)
    save_tiny_llama(server / "models" / "llm", SEED, layers=6)
    whole = federation.root / "whole"
    whole.mkdir()
    save_texts(whole / "train.jsonl", 72)
    save_texts(whole / "test.jsonl", 90, seed=1)  # averages are over 20 texts at least
    data = {
        "data.kind": "file",
        "data.path": str(whole),
        "data.owners": 3,
        "data.partition": "iid",
    }
    config = RunConfig.from_flat({**data, "seed": SEED})
    for name, (train, test) in zip(OWNERS, simulated_shares(config.data, SEED, True), strict=True):
        folder = federation.folder(name) / "data"
        folder.mkdir()
        for split, rows in (("train", train), ("test", test)):
            lines = [
                json.dumps({"text": text, "label": int(label)})
                for text, label in zip(rows.texts, rows.labels, strict=True)
            ]
            (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
        state = federation.folder(name) / "state"
        state.mkdir(mode=0o700)
        secret = state / "noise.secret"
        secret.write_bytes(OwnerSecret.for_simulation(SEED, f"owner-{OWNERS.index(name)}")._secret)
        secret.chmod(0o600)
    return data


@pytest.fixture(scope="module")
def run_through(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Federation, Any]]:
    """The whole runbook, from keys to ledgers; SuperLink and SuperNodes stay up behind it."""
    root = tmp_path_factory.mktemp("federation")
    processes = ProcessGroup(None)
    processes.watch()
    try:
        federation = Federation(root, processes)
        data = prepare_material(federation)
        for step in steps():
            federation.do(step)
        yield federation, data
    finally:
        processes.close()


# Averages carry noise of the owner's own, which no runtime repeats.
FIGURES = ("num-examples", "targets", "steps", "dp-epsilon")


def summary(server: dict[str, Any]) -> list[float]:
    """What must not depend on the runtime, of the whole and of each owner, round after round."""
    figures: list[float] = []
    for row in server["rounds"]:
        for phase in ("train", "evaluate"):
            metrics = row[phase]["metrics"]
            each = [metrics, *(own for _, own in sorted(metrics["owners"].items()))]
            figures += [m[name] for m in each for name in FIGURES if name in m]
        figures.append(row["lineage"]["pcs"])
    return figures


@pytest.mark.parametrize(("name", "weights"), [("split", "top"), ("offsite", "adapters")])
def test_a_run_between_organisations_equals_the_simulation(
    run_through: tuple[Federation, Any], name: str, weights: str, tmp_path: Path
) -> None:
    federation, data = run_through
    folder = federation.folder(SERVER) / "runs" / name
    deployed = json.loads((folder / "server.json").read_text())
    flat = {**federation.settings(f"{name}.toml"), **data}
    for own in ("session.host", "session.port"):
        flat.pop(own)

    # A test of its own holds that this and the simulation on Ray find the same.
    _, simulated = run_in_process(RunConfig.from_flat(flat), tmp_path)

    assert deployed["status"] == "completed"
    assert summary(deployed) == pytest.approx(summary(simulated), rel=1e-5)
    for row in deployed["rounds"]:
        assert row["train"]["lost"] == {}
        assert row["train"]["finished"] == ["owner-0", "owner-1", "owner-2"]
        assert row["lineage"]["verdict"]
    mine = load_file(folder / f"{weights}.safetensors")
    theirs = load_file(tmp_path / "server" / f"{weights}.safetensors")
    assert mine.keys() == theirs.keys()
    # DP-SGD's noise is the operating system's: with it, no step moves further than its rate.
    noisy = float(flat.get("dp.noise-multiplier", 0)) > 0
    steps_taken = flat["train.rounds"] * flat.get("train.max-steps", 0)
    near = 2 * steps_taken * flat["train.lr"] if noisy else 1e-6
    for tensor, value in mine.items():
        torch.testing.assert_close(value, theirs[tensor], rtol=1e-5, atol=near)


def test_each_owner_has_a_whole_ledger_of_its_own(run_through: tuple[Federation, Any]) -> None:
    federation, _ = run_through
    for name in OWNERS:
        lines = list(read_ledger(federation.folder(name) / "state"))
        assert {"hello", "representations", "metrics", "weights"} <= {x["kind"] for x in lines}
        assert {x["owner"] for x in lines} == {f"owner-{OWNERS.index(name)}"}


def test_a_changed_app_never_runs_and_both_digests_are_named(
    run_through: tuple[Federation, Any], tmp_path: Path
) -> None:
    federation, _ = run_through
    changed = tmp_path / "changed"
    shutil.copytree(federation.app, changed)
    mark = tmp_path / "ran"
    text = (changed / "pyproject.toml").read_text()
    text = text.replace("fedsplit.client_app:app", "unreviewed.client:app")
    text = text.replace("strategies.server_app:app", "unreviewed.server:app")
    text = text.replace('fab-include = ["strategies/**"]', 'fab-include = ["unreviewed/**"]')
    (changed / "pyproject.toml").write_text(text)
    (changed / "unreviewed").mkdir()
    (changed / "unreviewed" / "__init__.py").write_text("")
    (changed / "unreviewed" / "client.py").write_text(CHANGED_CLIENT.format(mark=str(mark)))
    (changed / "unreviewed" / "server.py").write_text(CHANGED_SERVER)
    before = {name: federation.ledger(name) for name in OWNERS}
    apps = {n: sorted((federation.folder(n) / "state/flower/apps").iterdir()) for n in OWNERS}
    home = federation.folder(SERVER) / "flower"

    told = federation.shell(SERVER, f"FLWR_HOME={home} flwr run {changed} fed --stream")

    asked = federation.shell(SERVER, f"fedsplit owner digest {changed}").strip()
    pinned = digest_of_app(federation.folder(SERVER) / "app.fab")
    replies = re.findall(r"REPLY (.*)", told)
    assert len(replies) == 3, told[-3000:]
    for reply in replies:
        assert f"app.digest: asked '{asked}', must be {pinned}" in reply
    assert asked != pinned
    assert not mark.exists()
    for name in OWNERS:
        assert asked in federation.log(name)
        assert pinned in federation.log(name)
        assert federation.ledger(name) == before[name]
        folder = federation.folder(name) / "state" / "flower" / "apps"
        assert sorted(folder.iterdir()) == apps[name]


def newcomer(federation: Federation, folder: Path, ca: Path) -> tuple[Path, Path]:
    """Return (node file, policy) of a machine with a node key of its own."""
    make_node(folder / "keys")
    shutil.copy(ca, folder / "keys" / "ca.pem")
    etc = federation.folder("bank") / "etc"
    text = (etc / "node.toml").read_text().replace('owner = "owner-1"', 'owner = "stranger"')
    text = text.replace(str(federation.folder("bank") / "state"), str(folder / "state"))
    (folder / "node.toml").write_text(text)
    shutil.copy(etc / "owner.toml", folder)
    return folder / "node.toml", folder / "owner.toml"


def test_a_node_that_is_not_registered_is_refused(
    run_through: tuple[Federation, Any], tmp_path: Path
) -> None:
    federation, _ = run_through
    ca = federation.folder(SERVER) / "keys" / "ca.pem"
    node, policy = newcomer(federation, tmp_path, ca)
    command = f"exec fedsplit owner start --node {node} --policy {policy}"
    child = federation.stay("bank", command, "stranger")

    assert wait_until(lambda: not child.alive, 90, 0.2), federation.log("stranger")[-3000:]

    assert child.process.returncode != 0
    assert "Failed to initialize the connection" in federation.log("stranger")
    assert "SuperNode ID:" not in federation.log("stranger")

    bare = f"--superlink localhost:{federation.ports[0]} --root-certificates {ca}"
    nameless = federation.stay(
        "bank", f"exec flower-supernode {bare} --port {free_port()} --max-retries 2", "nameless"
    )
    assert wait_until(lambda: not nameless.alive, 90, 0.2), federation.log("nameless")[-3000:]
    assert "SuperNode ID:" not in federation.log("nameless")


def test_an_owner_refuses_a_server_that_its_authority_does_not_vouch_for(
    run_through: tuple[Federation, Any], tmp_path: Path
) -> None:
    federation, _ = run_through
    foreign = make_keys(tmp_path / "foreign", ["localhost"]) / "ca.pem"
    node, policy = newcomer(federation, tmp_path, foreign)
    files = f"--node {node} --policy {policy}"

    checked = federation.shell("bank", f"fedsplit owner check {files}", code=1)
    started = federation.shell("bank", f"fedsplit owner start {files}", code=1)
    raw = federation.stay(
        "bank",
        f"exec flower-supernode --superlink localhost:{federation.ports[0]} "
        f"--root-certificates {foreign} --port {free_port()} --max-retries 2 "
        f"--auth-supernode-private-key {federation.folder('bank')}/etc/keys/node.key",
        "misled",
    )

    for told in (checked, started):
        assert "certificate is not one that" in " ".join(told.split())
    wait_until(lambda: not raw.alive, 60, 0.5)
    assert "SuperNode ID:" not in federation.log("misled")
    assert not (tmp_path / "state" / "ledger.jsonl").exists()


def test_a_second_start_on_one_home_is_refused(run_through: tuple[Federation, Any]) -> None:
    federation, _ = run_through
    etc = federation.folder("bank") / "etc"
    files = f"--node {etc}/node.toml --policy {etc}/owner.toml"
    told = federation.shell("bank", f"fedsplit owner start {files}", code=1)
    assert "runs on it already" in " ".join(told.split())


def test_an_owner_that_is_told_to_end_leaves_nothing_behind(
    run_through: tuple[Federation, Any],
) -> None:
    federation, _ = run_through
    child = federation.children["insurer"]
    began = time.monotonic()
    child.process.terminate()
    assert wait_until(lambda: not child.alive, 30, 0.1)
    assert time.monotonic() - began < 30
    assert child.process.returncode == 0
    assert not (federation.folder("insurer") / "state" / "flower" / "runtime").exists()
    marked = [p for p in os.listdir("/proc") if p.isdigit() and _serves(p, federation)]
    assert marked == []


def _serves(pid: str, federation: Federation) -> bool:
    """Whether a process works with the insurer's home (Linux)."""
    if sys.platform != "linux":
        return False
    try:
        arguments = Path("/proc", pid, "cmdline").read_bytes()
    except OSError:
        return False
    return os.fsencode(federation.folder("insurer") / "state") in arguments
