"""What was written before there were other tasks is read as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedsplit.errors import ModelError
from fedsplit.models.trained.weights import identity, load_trained, save_trained
from fedsplit.owners.policy.rules import Asked, Policy
from fedsplit.settings import read_settings


def test_a_checkpoint_without_a_range_is_of_no_regression(tmp_path: Path) -> None:
    path = tmp_path / "top.safetensors"
    belongs = identity(read_settings({"model.labels": 3}), "digest")
    older = {key: value for key, value in belongs.items() if key != "model.label-range"}
    save_trained(path, {"w": torch.ones(2)}, {}, older)
    assert load_trained(path, belongs).top["w"].tolist() == [1.0, 1.0]
    numbers = read_settings({"model.task": "regression", "model.label-range": "0,5"})
    with pytest.raises(ModelError, match=r"model\.task='sequence-classification'"):
        load_trained(path, identity(numbers, "digest"))
    save_trained(path, {"w": torch.ones(2)}, {}, identity(numbers, "digest"))
    other = read_settings({"model.task": "regression", "model.label-range": "0,4"})
    with pytest.raises(ModelError, match=r"model\.label-range='0,5': must be '0,4'"):
        load_trained(path, identity(other, "digest"))


@pytest.mark.parametrize(
    ("task", "broken"),
    [
        ("sequence-classification", ["labels.classes"]),
        ("multi-label", ["labels.classes"]),
        ("regression", []),
        ("causal-lm", []),
    ],
)
def test_a_policy_on_classes_is_about_tasks_that_have_some(task: str, broken: list[str]) -> None:
    config = read_settings({"model.task": task, "model.labels": 3, "model.label-range": "0,5"})
    policy = Policy({"labels": {"classes": 2}})
    found = policy.settings_breaches(Asked(config.to_flat()))
    assert [breach.rule for breach in found if breach.rule == "labels.classes"] == broken
