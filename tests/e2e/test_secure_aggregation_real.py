"""Masked sums with real Flower processes: Ray, and SuperLink with SuperNodes over TLS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedsplit.settings import read_settings
from simulations.runtime.federated import deploy, simulate
from simulations.runtime.local_run import run_in_process
from tests.tiny_models import save_texts, save_tiny_bert

pytestmark = pytest.mark.e2e


@pytest.mark.timeout(600)
def test_masked_joint_bottoms_are_the_plain_average_in_every_runtime(tmp_path: Path) -> None:
    plain: dict[str, Any] = {
        "model.name": str(save_tiny_bert(tmp_path / "bert")),
        "model.labels": 3,
        "model.max-tokens": 16,
        "split.bottom": "joint",
        "train.rounds": 2,
        "train.batch-size": 4,
        "train.max-steps": 2,
        "train.bottom-lr": 1e-2,
        "train.optimizer": "sgd",
        "data.kind": "file",
        "data.path": str(save_texts(tmp_path / "texts.jsonl", 90)),
        "data.owners": 3,
        "data.partition": "iid",
        "session.codec": "fp32",
        "robust.clip": 0.0,
        "robust.weight-cap": 0.0,
        "robust.screen": False,
        "output.threads": 1,
        "output.evaluate-every": 0,
    }
    masks = {"secure.aggregation": True, "secure.bound": 1.0, "secure.most-targets": 64}
    run_in_process(read_settings(plain), tmp_path / "plain")
    config = read_settings({**plain, **masks})
    _, simulated = simulate(config, tmp_path / "simulated")
    _, deployed = deploy(config, tmp_path / "deployed")
    for server in (simulated, deployed):
        assert [row["secure_aggregation"]["in_sum"] for row in server["rounds"]] == [3, 3]
        assert all(not row["train"]["lost"] for row in server["rounds"])
    wanted = load_file(tmp_path / "plain/server/top.safetensors")
    for folder in ("simulated", "deployed"):
        found = load_file(tmp_path / folder / "server/top.safetensors")
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
