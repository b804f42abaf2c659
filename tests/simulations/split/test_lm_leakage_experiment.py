"""The experiment on a language model's text: real runs, and a row for every attacker that fits."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from simulations.core.run_folder import RunFolder
from simulations.core.settings import Experiment, load_experiment
from simulations.split.label_leakage import protected
from simulations.split.lm_leakage import run
from tests.tiny_models import save_texts, save_tiny_llama


def test_gradients_of_a_language_model_are_read_over_either_transport(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "model.task": "causal-lm",
        "model.max-tokens": 10,
        "train.rounds": 1,
        "train.batch-size": 4,
        "split.k": 1,
        "data.kind": "file",
        "data.path": str(save_texts(tmp_path / "texts.jsonl", 16)),
        "data.owners": 2,
        "data.partition": "iid",
        "lineage.gate": "off",
        "output.evaluate-every": 0,
        "labels.protection": "none",
        "privacy.mechanism": "dchi",
        "privacy.eta": 2.0,
    }
    options = {
        "models": [str(save_tiny_llama(tmp_path / "model"))],
        "protections": ["none", "client-head+none", "client-head+row-noise:noise-ratio=100"],
        "transports": ["messages"],
        "attackers": ["logit_gradients", "closed_form", "gradient_map", "joint"],
        "budget": ["joint.beams=2", "joint.rereads=0", "joint.samples=4"],
        "samples": 6,
    }
    experiment = Experiment("lm-leakage", "lm-leakage", "a test", settings, options)
    with RunFolder(tmp_path / "out", name="lm-leakage", kind="table") as folder:
        run(experiment, folder, Console(file=io.StringIO()))

    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    found = {(row["protection"], row["attacker"]): row for row in rows}
    head, noisy = options["protections"][1:]
    assert found["none", "logit_gradients"]["text_recovery"] == 1.0
    assert found[head, "closed_form"]["token_recovery"] == 1.0
    assert found[head, "joint"]["token_recovery"] > 0.8
    assert found[noisy, "gradient_map"]["token_recovery"] < 0.5
    assert ("none", "closed_form") not in found
    for row in rows:
        assert row["token_recovery_low"] <= row["token_recovery"] <= row["token_recovery_high"]
        assert {"model", "transport", "guess", "text_recovery_low", "text_guess"} <= row.keys()


def test_the_published_settings_are_valid() -> None:
    experiment = load_experiment("lm-leakage")
    for protection in experiment.options["protections"]:
        assert protected(experiment.config, protection, 1).labels.protection == protection
