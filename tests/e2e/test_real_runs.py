"""Whole runs with real Flower processes: Ray, SuperLink, SuperNodes, TLS."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedsplit.config import RunConfig
from simulations.runtime.federated import ENGINES, deploy, simulate
from simulations.runtime.local_run import run_in_process
from tests.tiny_models import save_texts, save_tiny_bert

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).resolve().parents[2]
RUN = [sys.executable, "-m", "simulations", "run", "demo"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("material")
    return {
        "model.name": str(save_tiny_bert(folder / "bert")),
        "model.labels": 3,
        "model.max-tokens": 16,
        "train.rounds": 2,
        "train.batch-size": 4,
        "train.max-steps": 0,  # whole epochs: the second round sends nothing anew
        "train.lr": 1e-2,
        "data.kind": "file",
        "data.path": str(save_texts(folder / "texts.jsonl", 80)),
        "data.owners": 2,
        "data.partition": "iid",
        "privacy.mechanism": "dchi",
        "privacy.eta": 40.0,
        "session.codec": "fp32",
        "output.threads": 1,
    }


def summary(server: dict[str, Any]) -> list[float]:
    """What must not depend on the runtime: losses, accuracy, lineage, round after round."""
    figures: list[float] = []
    for row in server["rounds"]:
        figures += [row["train"]["metrics"]["loss"], row["evaluate"]["metrics"]["accuracy"]]
        figures.append(row["lineage"]["pcs"])
    return figures


@pytest.mark.timeout(600)
def test_simulation_and_deployment_agree(settings: dict[str, Any], tmp_path: Path) -> None:
    config = RunConfig.from_flat(settings)

    _, simulated = simulate(config, tmp_path / "simulation")
    _, deployed = deploy(config, tmp_path / "deployment")

    # Sweeps run their cells within one process, and must find what the others find.
    _, local = run_in_process(config, tmp_path / "local")

    assert summary(simulated) == pytest.approx(summary(deployed), rel=1e-5)
    assert summary(local) == pytest.approx(summary(deployed), rel=1e-5)
    for server in (simulated, deployed, local):
        assert all(not row["train"]["lost"] for row in server["rounds"])
        assert server["rounds"][0]["train"]["row_bytes"] > 0
        assert server["rounds"][1]["train"]["row_bytes"] == 0


@pytest.mark.timeout(600)
def test_both_engines_give_the_same_model_bit_for_bit(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    config = RunConfig.from_flat({**settings, "data.owners": 3, "split.bottom": "joint"})
    found = {}
    for engine in ENGINES:
        _, server = simulate(config, tmp_path / engine, engine=engine)
        assert all(not row["train"]["lost"] for row in server["rounds"])
        found[engine] = load_file(tmp_path / engine / "server" / "top.safetensors")
    hosts, flower = (found[engine] for engine in ENGINES)
    assert hosts.keys() == flower.keys()
    assert all(torch.equal(hosts[name], flower[name]) for name in hosts)


@pytest.mark.timeout(600)
def test_an_experiment_from_the_command_line(settings: dict[str, Any], tmp_path: Path) -> None:
    wanted = {**settings, "output.transcript": True, "train.rounds": 1}
    overrides = [x for k, v in wanted.items() for x in ("--set", f"{k}={json.dumps(v)}")]
    out = tmp_path / "run"

    done = subprocess.run(
        [*RUN, "--out", str(out), "--set", "model.sha256=", "--set", "privacy.cti=off", *overrides],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )

    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads((out / "results.json").read_text())
    assert results["status"] == "completed"
    assert set(results["utility"]) >= {"metric", "federated", "centralised", "baseline"}
    inversion = results["privacy"]["embedding_inversion"]
    assert inversion["empirical_privacy"] == pytest.approx(1 - inversion["success"])
    assert results["lineage"][0]["verdict"]
    assert results["traffic"]["bytes_per_token"] > 0
    assert (out / "config.toml").exists()
    assert "empirical privacy" in done.stdout


def test_what_is_wrong_is_said_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [*RUN, "--out", str(tmp_path / "run"), "--set", "privacy.eta=-1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "privacy.eta=-1" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
