"""The experiment on recorded gradients: it reads what was sent, and its rows are complete."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import BertForSequenceClassification

from fedsplit.attacks.labels.leakage import labels_from_norm
from fedsplit.attacks.transcripts import Transcript
from fedsplit.errors import ConfigError, RunError
from simulations.core.run_folder import RunFolder
from simulations.core.settings import Experiment, load_experiment
from simulations.split.label_leakage import (
    Recorded,
    attack_all,
    protected,
    recorded_of,
    run,
)
from tests.tiny_models import save_texts, save_tiny_bert


def test_a_servers_head_leaks_all_labels_and_drawn_ones_fewer(tmp_path: Path) -> None:
    """A tiny model and texts: every row of the table is there, with its interval and baseline."""
    model = save_tiny_bert(tmp_path / "model")
    BertForSequenceClassification.from_pretrained(
        model, num_labels=2, ignore_mismatched_sizes=True
    ).save_pretrained(model)
    settings: dict[str, Any] = {
        "model.name": str(model),
        "model.labels": 2,
        "model.max-tokens": 12,
        "train.rounds": 2,
        "train.batch-size": 8,
        "data.kind": "file",
        "data.path": str(save_texts(tmp_path / "texts.jsonl", 80, classes=2)),
        "data.owners": 2,
        "data.partition": "iid",
        "lineage.gate": "off",
    }
    protections = ["none", "client-head", "randomised-response:epsilon=0.5"]
    options = {"seeds": 1, "protections": protections, "known": 6}
    experiment = Experiment("label-leakage", "label-leakage", "a test", settings, options)
    folder = RunFolder(tmp_path / "out", name="label-leakage", kind="table")
    with folder:
        run(experiment, folder, Console(file=io.StringIO()))
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    found = {(r["protection"], r["attack"]): r for r in rows}
    assert len(found) == len(rows) == 3 + 2 + 3
    assert found["none", "sign"]["leaked_one_pass"] == 1.0
    assert found["none", "sign"]["leaked_all_passes"] == 1.0
    assert found["randomised-response", "sign"]["leaked_all_passes"] < 0.85
    assert found["randomised-response", "sign"]["setting"] == "epsilon=0.5"
    for row in rows:
        assert row["leaked_low"] <= row["leaked"] <= row["leaked_high"]
        assert 0.5 <= row["baseline"] < 0.8
        assert row["samples"] == 64 - 6
        assert 0 <= row["accuracy"] <= 1


def test_the_published_settings_are_valid() -> None:
    experiment = load_experiment("label-leakage")
    for protection in experiment.options["protections"]:
        cell = protected(experiment.config, protection, 2)
        assert cell.labels.protection == protection.partition(":")[0]
        assert cell.seed == experiment.config.seed + 2
    with pytest.raises(ConfigError, match=r"labels\.epsilon"):
        protected(experiment.config, "randomised-response:epsilon=much", 0)


def test_the_norm_attack_needs_norms_that_differ() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = (torch.rand(400, generator=generator) < 0.4).long()
    rows = torch.nn.functional.normalize(torch.randn(400, 8, generator=generator), dim=1)
    known = {i: int(truth[i]) for i in range(12)}
    guess = labels_from_norm(rows * (1.0 + 3.0 * truth)[:, None], known)
    assert torch.equal(guess, truth)
    hidden = labels_from_norm(rows, known)
    assert float((hidden == truth).double().mean()) < 0.75


def test_known_rows_are_not_scored() -> None:
    truth = torch.arange(40) % 2
    rows = torch.nn.functional.one_hot(1 - truth, 2).double()
    found = attack_all(Recorded(rows, rows, truth), False, 10, 0)
    assert found["sign"]["samples"] == 30
    assert found["sign"]["leaked"] == 1.0


def test_nothing_recorded_is_an_error() -> None:
    with pytest.raises(RunError, match="recorded gradients"):
        recorded_of(Transcript(), [])
