"""Rounds that do not wait, with real Flower processes: a slow owner's update counts later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsplit.config import RunConfig
from fedsplit.emulators.files import load_emulator, load_tokenizer
from fedsplit.owners.data_source import own_data
from fedsplit.owners.offsite.owner import AdapterOwner, blocks_of_sets
from fedsplit.owners.policy.rules import Policy
from fedsplit.owners.reports import SessionReport
from fedsplit.privacy.secret import OwnerSecret
from fedsplit.settings import read_settings
from simulations.runtime.certificates import make_certificates
from simulations.runtime.deployment import Deployment
from simulations.runtime.federated import ROOT, read_server
from tests.tiny_models import save_texts, save_tiny_llama

pytestmark = pytest.mark.e2e
# Texts, with a step for each two blocks of eight tokens: the slow owner trains for as long as the
# quick one's app takes to start two or three times, on a busy machine as on an idle one.
QUICK, SLOW = 60, 5000
ROUNDS = 5


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    public = tmp_path / "public.txt"
    public.write_text("\n".join(f"the {i} th public line of words" for i in range(200)))
    return read_settings(
        {
            "strategy": "offsite-tuning",
            "model.name": str(save_tiny_llama(tmp_path / "llama")),
            "model.task": "causal-lm",
            "offsite.compressor": "layerdrop",
            "offsite.positions": "0,2",
            "offsite.keep": 1,
            "offsite.settle-steps": 0,
            "offsite.block": 8,
            "offsite.public": str(public),
            "train.optimizer": "sgd",
            "train.lr": 1e-3,
            "train.batch-size": 2,
            "train.max-steps": 0,  # an owner's own epoch, however many steps that takes
            "train.rounds": ROUNDS,
            "train.min-owners": 2,
            "buffer.size": 1,
            "robust.clip": 0.0,
            "session.codec": "fp32",
            "output.dir": str(tmp_path / "server"),
            "output.evaluate-every": 0,
            "output.checkpoint-steps": -1,
            "output.threads": 1,
            "output.save": False,
        }
    )


@pytest.fixture
def owners(tmp_path: Path) -> list[dict[str, str | int | float | bool]]:
    """Node configs of owners on a machine of their own: nothing of a simulation."""
    found: list[dict[str, str | int | float | bool]] = []
    for seed, (name, rows) in enumerate((("quick", QUICK), ("slow", SLOW))):
        home = tmp_path / name
        home.mkdir()
        data = save_texts(home / "texts.jsonl", rows, seed)
        found.append({"owner": name, "data-path": str(data), "state-dir": str(home / "state")})
    return found


def own_change(config: RunConfig, node: dict[str, Any]) -> float:
    """Return the norm of what an owner's first round of training changes, from its own files."""
    home = Path(node["state-dir"])
    (folder,) = (home / "emulators").iterdir()
    secret = OwnerSecret.load_or_create(home / "noise.secret")
    train, test = own_data(config, node, secret)
    blocks = blocks_of_sets(load_tokenizer(folder), train, test, config.offsite.block)
    report = SessionReport(Policy({}), secret)
    owner = AdapterOwner(load_emulator(folder), blocks, config, node["owner"], secret, report)
    begun = {name: tensor.clone() for name, tensor in owner.weights().items()}
    owner.train(1)
    return length({name: tensor - begun[name] for name, tensor in owner.weights().items()})


def length(tensors: dict[str, Tensor]) -> float:
    return float(torch.sqrt(sum((t.double() ** 2).sum() for t in tensors.values())))


@pytest.mark.timeout(1200)
def test_a_slow_owners_update_counts_in_a_later_round_by_its_staleness(
    config: RunConfig,
    owners: list[dict[str, str | int | float | bool]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("FEDSPLIT_SIMULATION", raising=False)  # else the clock is a virtual one
    tls = make_certificates(tmp_path / "tls").environment
    with Deployment(
        len(owners),
        log_dir=tmp_path / "log",
        node_configs=owners,
        env=tls,
        server_threads=1,
        client_threads=1,
    ) as deployment:
        deployment.run(ROOT, config.to_flat(), timeout_s=1000.0)
    rows = read_server(tmp_path / "server")["rounds"]

    assert len(rows) == ROUNDS
    assert all(not row["train"]["lost"] for row in rows)
    assert rows[0]["buffer"]["staleness"] == {"quick": 0}
    assert rows[0]["buffer"]["at_work"] == ["slow"]
    late = next(row for row in rows if "slow" in row["buffer"]["staleness"])
    rounds = late["buffer"]["staleness"]["slow"]
    assert rounds == late["round"] - 1 >= 1
    assert all(row["buffer"]["at_work"] == ["slow"] for row in rows[:rounds])
    assert late["train"]["metrics"]["owners"]["slow"]["steps"] > 1000
    used = late["lineage"]["contributions"]["slow"]["norm"]
    whole = own_change(config, owners[1])
    assert used == pytest.approx((1 + rounds) ** -0.5 * whole, rel=1e-3)
