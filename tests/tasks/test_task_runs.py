"""Whole runs of each task: the federation is its centralised twin, and what leaves is as agreed."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fedsplit.attacks.transcripts import read_true_labels
from fedsplit.cli import app_cli
from fedsplit.config import RunConfig
from fedsplit.models.trained.whole import whole_of_run
from fedsplit.owners.serving.inference import ask
from fedsplit.settings import check_settings
from simulations.core.owner_samples import owner_samples
from simulations.split.centralised import CentralisedTwin
from simulations.split.transcript_attacks import write_truth_file
from strategies.base_model import load_base
from tests.strategies.conftest import make_config, run_locally, texts, tiny_bert
from tests.strategies.serving.test_serving import served

__all__ = ["make_config", "run_locally", "texts", "tiny_bert"]  # fixtures
TASKS: dict[str, dict[str, Any]] = {
    "regression": {"model__label_range": "0,5", "data__text_column": "one, two"},
    "multi-label": {"model__label_names": "art, law, sport", "model__labels": 3},
}
HEADLINE = {"regression": "spearman", "multi-label": "micro-f1"}


@pytest.fixture(params=list(TASKS))
def task(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make(make_config: Any, tmp_path: Path) -> Any:
    """Return a function from a task and overrides to settings of a small run."""

    def made(task: str, **overrides: Any) -> RunConfig:
        rows: list[dict[str, Any]] = []
        for i in range(66):
            row: dict[str, Any] = {"one": f"w{i % 9} w{i % 7}", "two": f"w{i % 5} w3"}
            row |= {"text": f"{row['one']} {row['two']}"}
            sets = [["art", "law", "sport"][j] for j in range(3) if i % (j + 2) == 0]
            row["label"] = (i % 9) / 2 if task == "regression" else sets
            rows.append(row)
        path = tmp_path / f"{task}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {"model__task": task, "data__path": str(path), **TASKS[task], **overrides}
        config: RunConfig = make_config(**settings)
        return config

    return made


def evaluated(run: Any) -> dict[str, Any]:
    found: dict[str, Any] = run.server["rounds"][-1]["evaluate"]["metrics"]
    return found


@pytest.mark.parametrize("transport", ["stream", "messages"])
def test_a_federation_is_its_centralised_twin(
    make: Any, run_locally: Any, task: str, transport: str, tmp_path: Path
) -> None:
    config = make(
        task, split__k=1, train__optimizer="sgd", train__lr=0.1, session__transport=transport
    )
    run = run_locally(config)
    twin = CentralisedTwin(config, owner_samples(config, load_base(config).tokenizer))
    report = twin.run([row["train"]["waves"] for row in run.server["rounds"]])

    central = {n: p.detach() for n, p in twin.top.named_parameters() if n in run.state}
    assert central.keys() == run.state.keys()
    for name, value in central.items():
        assert float((value - run.state[name]).abs().max()) < 1e-5, name
    found = evaluated(run)
    assert report.loss == pytest.approx(found["loss"], rel=1e-3)
    told = {key: value for key, value in report.metrics.items() if isinstance(value, float)}
    assert HEADLINE[task] in told
    for key, value in told.items():
        assert found[key] == pytest.approx(value, rel=1e-3, abs=1e-3), key
    assert not any(key.split("-")[-1].isdigit() for row in found["owners"].values() for key in row)
    owners = owner_samples(config, load_base(config).tokenizer)
    assert read_true_labels(write_truth_file(tmp_path, owners)) == {}  # no classes


@pytest.mark.parametrize("protection", ["client-head", "client-head+row-noise", "client-tail"])
def test_owners_with_the_head_learn(
    make: Any, run_locally: Any, task: str, protection: str
) -> None:
    method = {"train__method": "head"} if protection == "client-tail" else {}
    run = run_locally(make(task, labels__protection=protection, labels__tail_blocks=1, **method))
    rows = run.server["rounds"]
    assert all(row["train"]["lost"] == row["evaluate"]["lost"] == {} for row in rows)
    assert HEADLINE[task] in evaluated(run)


@pytest.mark.parametrize(
    ("rules", "leave"),
    [
        ("[reports]\ncounts = true\n", True),
        ("[reports]\ncounts = false\n", False),
        ("[reports]\ncounts = true\nepsilon = 1.0\n", False),
    ],
)
def test_sums_leave_only_as_the_owner_says(
    make: Any,
    run_locally: Any,
    task: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rules: str,
    leave: bool,
) -> None:
    policy = tmp_path / "owner.toml"
    policy.write_text(rules)
    policy.chmod(0o600)
    monkeypatch.setenv("FEDSPLIT_POLICY", str(policy))
    row = run_locally(make(task, train__rounds=1, train__max_steps=1)).server["rounds"][-1]
    assert row["evaluate"]["lost"] == {}
    assert (HEADLINE[task] in row["evaluate"]["metrics"]) is leave
    assert row["evaluate"]["metrics"]["loss"] >= 0.0


@pytest.mark.parametrize("bound", [0.5, 1.0])
def test_a_policy_bounds_how_many_labels_are_read(
    make: Any,
    run_locally: Any,
    task: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bound: float,
) -> None:
    """With the head at the server a gradient shows the number, or each class, exactly."""
    policy = tmp_path / "owner.toml"
    policy.write_text(f"[labels]\nmax_recovery = {bound}\n")
    policy.chmod(0o600)
    monkeypatch.setenv("FEDSPLIT_POLICY", str(policy))
    config = make(task, train__rounds=1, train__max_steps=0, train__batch_size=8)
    if bound < 1:
        with pytest.raises(Exception, match=r"labels\.max_recovery"):
            run_locally(config)
    else:
        assert run_locally(config).server["rounds"][-1]["train"]["lost"] == {}


def test_a_tuned_model_answers_and_is_exported(
    make: Any, run_locally: Any, task: str, tmp_path: Path
) -> None:
    config = make(task, data__text_column="text")
    run = run_locally(config)
    given = ["w1 w2 w3 w4", "w50 w7 w9"]
    weights = str(run.folder / "top.safetensors")
    serving = check_settings(
        replace(config, strategy="serving", serving=replace(config.serving, weights=weights))
    )
    asked, out = tmp_path / "asked.csv", tmp_path / "answers.csv"
    asked.write_text("text\n" + "\n".join(given) + "\n\n")
    with served(serving, tokens=16) as (_, home, _announcer):
        scores, told, _ = ask(home, given)
        done = CliRunner().invoke(
            app_cli,
            ["predict", "--file", str(asked), "--out", str(out), "--home", str(home)],
            env={"COLUMNS": "200"},
        )
    assert done.exit_code == 0, done.output
    whole = whole_of_run(run.folder)
    model = whole.loaded.model.eval()
    tokens = whole.loaded.tokenizer(given, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
    assert torch.allclose(scores, logits.logits, atol=1e-4)
    assert model.config.problem_type == told.problem
    answers = told.answers(scores, ("art", "law", "sport"))
    with open(out, newline="") as file:
        written = list(csv.DictReader(file))
    column = told.answer_columns[0]
    if task == "regression":
        assert [float(row[column]) for row in written[:2]] == pytest.approx(
            [answer["value"] for answer in answers], abs=1e-4
        )
        assert all(0.0 <= answer["value"] <= 5.0 for answer in answers)
    else:
        assert [row[column] for row in written[:2]] == [", ".join(a["classes"]) for a in answers]
    about = whole.write(tmp_path / "export")
    assert about["settings"]["model.label-range"] == config.model.label_range
