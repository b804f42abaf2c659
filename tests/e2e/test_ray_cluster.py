"""Two Ray nodes on one machine: the model of one node, and a node that is killed on the way."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from fedsplit.config import RunConfig
from fedsplit.wire.tokens import TokenBook
from simulations.runtime.environment import ray_credentials
from simulations.runtime.federated import simulate
from tests.tiny_models import save_texts, save_tiny_bert

pytestmark = pytest.mark.e2e
OWNERS = 6
# A head and a second node, each with one processor, from one process that stays.
CLUSTER = """
import sys, ray
from ray.cluster_utils import Cluster
node = {"num_cpus": 1, "object_store_memory": 80 << 20}
cluster = Cluster(initialize_head=True, head_node_args=node)
second = cluster.add_node(**node)
cluster.wait_for_nodes()
print("address", cluster.address, flush=True)
for line in sys.stdin:
    if line.strip() == "kill":
        cluster.remove_node(second, allow_graceful=False)
        print("killed", flush=True)
    else:
        break
cluster.shutdown()
"""


@dataclass
class TwoNodes:
    """The cluster, and how to kill its second node."""

    address: str
    process: subprocess.Popen[str]
    folder: Path

    def kill_one(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("kill\n")
        self.process.stdin.flush()


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TwoNodes]:
    token = ray_credentials()
    for name, value in token.items():
        monkeypatch.setenv(name, value)
    folder = Path(f"/tmp/fs-{os.getpid()}")  # a socket's path must be short
    rest = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    quick = {"RAY_health_check_period_ms": "500", "RAY_health_check_initial_delay_ms": "0"}
    quick["RAY_worker_niceness"] = "0"  # Ray's is 15: beside other work hosts would never start
    env = {**rest, **token, **quick, "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": str(folder)}
    folder.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        env=env,
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        told = next(line for line in process.stdout if line.startswith("address "))
        yield TwoNodes(told.split()[1], process, folder)
    finally:
        children = psutil.Process(process.pid).children(recursive=True)
        try:
            process.communicate("stop\n", timeout=30)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            process.kill()
        for child in children:
            if child.is_running():
                child.kill()
        subprocess.run(["rm", "-rf", str(folder)], check=False)


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    return {
        "model.name": str(save_tiny_bert(tmp_path / "bert")),
        "model.labels": 3,
        "model.max-tokens": 16,
        "train.rounds": 2,
        "train.batch-size": 4,
        "train.max-steps": 2,
        "train.lr": 1e-2,
        "data.kind": "file",
        "data.path": str(save_texts(tmp_path / "texts.jsonl", 96)),
        "data.owners": OWNERS,
        "data.partition": "iid",
        "privacy.mechanism": "dchi",
        "privacy.eta": 40.0,
        "session.wave": OWNERS,
        "session.reconnect-s": 1.0,
        "session.wave-wait-s": 60.0,
        "lineage.gate": "off",
        "output.evaluate-every": 0,
        "output.threads": 1,
    }


def trained(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "server" / "top.safetensors")


@pytest.mark.timeout(600)
def test_two_nodes_give_the_model_of_one_and_tell_no_token(
    settings: dict[str, Any], cluster: TwoNodes, tmp_path: Path
) -> None:
    config = RunConfig.from_flat(settings)
    _, alone = simulate(config, tmp_path / "alone")

    _, server = simulate(config, tmp_path / "two", ray_address=cluster.address)

    one, two = trained(tmp_path / "alone"), trained(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert server["hosts"]["hosts"] == 2
    assert [row["owner"] for row in server["sent"]] == [f"owner-{i}" for i in range(OWNERS)]
    assert [r["bytes"] for r in server["sent"]] == [r["bytes"] for r in alone["sent"]]
    logs = [p for p in cluster.folder.rglob("logs/*") if p.is_file()]
    assert logs
    token = re.compile(r"[0-9a-f]{32}\.[0-9.]+\.[0-9a-f]{64}")  # as fedsplit.wire.tokens has it
    assert token.fullmatch(TokenBook().issue(1, 1, 1, "train"))
    for path in [*logs, *(tmp_path / "two" / "log").iterdir()]:
        assert not token.search(path.read_text(errors="replace")), path


@pytest.mark.timeout(600)
def test_a_killed_node_costs_its_owners_part_of_a_round(
    settings: dict[str, Any], cluster: TwoNodes, tmp_path: Path
) -> None:
    # The page is written once a second, and a node takes a moment to die: rounds of many seconds.
    long = {"train.rounds": 3, "train.max-steps": 400, "train.epochs": 400}
    config = RunConfig.from_flat({**settings, **long})
    page = tmp_path / "run" / "server" / "progress.json"

    def kill_in_the_second_round() -> None:
        while True:
            time.sleep(0.05)
            try:
                told = json.loads(page.read_bytes())
            except (OSError, ValueError):
                continue
            if told["round"] == 2 and told["step"] >= 1:
                cluster.kill_one()
                return

    threading.Thread(target=kill_in_the_second_round, daemon=True).start()
    _, server = simulate(config, tmp_path / "run", ray_address=cluster.address)

    first, second, third = [row["train"] for row in server["rounds"]]
    assert first["lost"] == {}
    assert len(second["lost"]) == OWNERS // 2
    assert third["lost"] == {}
    assert len(third["finished"]) == OWNERS
