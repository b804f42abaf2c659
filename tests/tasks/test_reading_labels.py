"""What an owner's own readers make of gradients of each task, and how a policy judges it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fedsplit.cli import app_cli
from fedsplit.owners.measuring import measured_labels
from fedsplit.owners.policy.rules import Policy
from fedsplit.owners.samples import Samples, text_identity
from fedsplit.owners.split.protected_labels import label_channel, protected_labels
from fedsplit.privacy.secret import OwnerSecret
from fedsplit.settings import read_settings
from fedsplit.tasks import task_of
from tests.tiny_models import save_tiny_bert

SECRET = OwnerSecret(bytes(range(32)))
COUNT = 96
ABOUT: dict[str, dict[str, Any]] = {
    "regression": {"model.label-range": "0,5"},
    "multi-label": {"model.labels": 3},
}


def read(task: str, protection: str, **more: Any) -> float:
    """Return the share of labels that an owner's readers have right."""
    config = read_settings(
        {"model.task": task, **ABOUT[task], "labels.protection": protection, **more}
    )
    numbers = torch.rand(COUNT, generator=torch.Generator().manual_seed(3))
    labels: list[Any] = (5 * numbers).tolist()
    if task == "multi-label":
        labels = [(0,) if number > 0.5 else (1, 2) for number in numbers]
    samples = Samples(
        tuple(torch.tensor([2, 5, 3]) for _ in labels),
        task_of(config).tensor(labels, [""] * COUNT),
        tuple(text_identity(str(number)) for number in range(COUNT)),
    )
    _, side = protected_labels(config, SECRET, samples, samples, 99)
    channel = label_channel(side, samples)
    assert channel is not None
    policy = Policy({"budget": {"epochs_per_bottom": 1}})
    return measured_labels(policy, channel, SECRET).value


def test_a_number_stands_in_its_gradient_and_noise_hides_it() -> None:
    assert read("regression", "none") == 1.0
    loud = {"labels.noise-ratio": 30.0, "labels.gradient-clip": 4.0}
    assert read("regression", "row-noise", **loud) < 0.25  # of 21 levels
    faint = {"labels.noise-ratio": 0.001, "labels.gradient-clip": 8.0}
    assert read("regression", "row-noise", **faint) > 0.9


def test_sets_of_classes_count_as_read() -> None:
    assert read("multi-label", "none") == 1.0
    assert read("multi-label", "row-noise", **{"labels.noise-ratio": 30.0}) == 1.0


@pytest.mark.parametrize("task", ["causal-lm", "multiple-choice"])
def test_a_language_models_next_tokens_count_as_read(task: str) -> None:
    """Whoever has the whole model reads them off gradients, so no bound below 1 is kept."""
    ids = tuple(torch.tensor([2, 5, 7, 3]) for _ in range(9))
    samples = Samples(ids, None, tuple(text_identity(str(n)) for n in range(9)))
    for protection in ("none", "row-noise"):
        config = read_settings({"model.task": task, "labels.protection": protection})
        channel = label_channel(protected_labels(config, SECRET, samples, samples, 99)[1], samples)
        assert channel is not None
        figures = measured_labels(Policy({}), channel, SECRET)
        for bound, refused in ((0.3, True), (0.75, True), (0.99, True), (1.0, False)):
            breach = figures.breach(Policy({"measure": {"max_label_recovery": bound}}))
            assert (breach is not None) is refused, (protection, bound)
    about = {"labels.protection": "client-tail", "train.method": "head"}
    config = read_settings({"model.task": task, **about})
    assert label_channel(protected_labels(config, SECRET, samples, samples, 99)[1], samples) is None


@pytest.mark.parametrize(("bound", "code"), [(0.5, 1), (1.0, 0)])
def test_measuring_by_hand_reads_numbers(tmp_path: Path, bound: float, code: int) -> None:
    model = save_tiny_bert(tmp_path / "model")
    rows = [{"text": f"w{i} w{i % 7}", "score": i / 8} for i in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    policy = tmp_path / "owner.toml"
    policy.write_text(f"[measure]\nmax_label_recovery = {bound}\ntexts = 8\nseconds = 5\n")
    policy.chmod(0o600)
    words = [
        *("policy", "measure", policy, "--model", model, "--data", tmp_path / "a.jsonl"),
        *("--label-column", "score", "--home", tmp_path / "home"),
        *("--set", "model.task=regression", "--set", "model.label-range=0,5"),
        *("--json", tmp_path / "out.json"),
    ]
    done = CliRunner().invoke(app_cli, [str(word) for word in words], env={"COLUMNS": "200"})
    assert done.exit_code == code, done.output
    found = json.loads((tmp_path / "out.json").read_text())
    assert [row["value"] for row in found if "label" in row["rule"]] == [1.0]
