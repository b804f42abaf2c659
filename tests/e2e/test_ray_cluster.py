"""Two Ray nodes on one machine: the model of one node, and a node that is killed on the way."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedsplit.config import RunConfig
from fedsplit.wire.tokens import TokenBook
from simulations.runtime.federated import simulate
from tests.e2e.two_nodes import TwoNodes
from tests.tiny_models import save_texts, save_tiny_bert

pytestmark = pytest.mark.e2e
OWNERS = 6


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
