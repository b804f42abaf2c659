"""The kind ``offsite``, as ``llm-demo`` runs it, at the size of a tiny random LLaMA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fedsplit.emulators.importance.files import ImportanceSettings, load_scores
from fedsplit.emulators.importance.run import LayerReplace
from fedsplit.errors import ConfigError, ModelError
from fedsplit.models import load
from simulations.core.kinds import KINDS
from simulations.core.run_folder import RunFolder, read_results
from simulations.core.settings import Experiment, load_experiment
from simulations.offsite import federated_run
from tests.commands.scene import simulate_here
from tests.tiny_models import save_tiny_llama

TINY = (
    "data.limit=90",
    "train.max-steps=2",
    "train.batch-size=4",
    "offsite.settle-steps=2",
    "offsite.adapters=2",
    "offsite.block=24",
    "offsite.rank=2",
    "output.threads=1",
    "options.new-tokens=4",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("base"), layers=5)


@pytest.fixture(scope="module")
def scores(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small file of an importance run: its JSON alone."""
    folder = tmp_path_factory.mktemp("importance")
    ids = torch.randint(4, 90, (16, 12), generator=torch.Generator().manual_seed(0))
    settings = ImportanceSettings(steps=4, batch_size=4, rl_every=2, cost_batches=1)
    model = load(base, "causal-lm").model
    LayerReplace(model, ids[:8], ids[8:], settings).run(checkpoint=folder)
    alone = folder / "scores.json"
    (folder / "importance.json").rename(alone)
    return alone


def carry_out(base: Path, scores: Path, folder: Path, *more: str) -> tuple[dict[str, Any], str]:
    own = (f"model={base}", f"offsite.scores={scores}")
    experiment = load_experiment("llm-demo", [*own, *TINY, *more])
    console = Console(record=True, width=200)
    with RunFolder(folder, name="llm-demo", kind=experiment.result_kind) as run_folder:
        KINDS[experiment.kind](experiment, run_folder, console)
    return read_results(folder), console.export_text()


def test_the_demo_answers_before_and_after_and_tells_the_lineage(
    base: Path, scores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(federated_run, "simulate", simulate_here)

    results, shown = carry_out(base, scores, tmp_path / "run", "offsite.alpha=0.5")

    before, after = results["rows"]
    assert (before["model"], after["model"]) == ("base", "plugged in")
    assert before["prompt"] == after["prompt"]
    assert before["prompt"].startswith("What does Python's ")
    assert after["loss"] < before["loss"], "tuned on such answers, it must find them likelier"
    about = load_scores(scores, load(base, "causal-lm").model)
    best = sorted(sorted(range(5), key=lambda i: -about.costs[i])[:2])
    assert results["emulator"]["adapters"] == best, "A is what the file's costs say"
    assert results["emulator"]["roles"].count("harmonizer") == 2  # half of the three others
    assert results["emulator"]["importance_s"] < 5
    assert results["verdict"]["verdict"] in ("in_lineage", "not_shown", "independent")
    assert results["verdict"]["score"] > 0.5
    assert len(results["lineage"]) == 2
    for text in ("the model before", "the model after", "lineage, at the end", before["answer"]):
        assert text in shown


def test_what_is_no_offsite_run_is_refused(base: Path, tmp_path: Path) -> None:
    loaded = load_experiment("llm-demo", [f"model={base}", "offsite.scores="])
    split = Experiment("x", "offsite", "", {**loaded.run, "strategy": "split-tuning"})
    folder = RunFolder(tmp_path / "run", name="x", kind="table")
    with pytest.raises(ConfigError, match="strategy='split-tuning': must be offsite-tuning"):
        federated_run.run(split, folder, Console())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"step": "3"}, "step='3': must be an integer"),
        ({"costs": []}, "costs: must be 5 finite numbers"),
        ({"scores": [1.0, 2.0]}, "scores: must be 5 finite numbers"),
        ({"scores": [1.0, 2.0, "x", 0.0, 1.0]}, "scores: must be 5 finite numbers"),
        ({"base_digest": "0" * 64}, "must be this model's"),
        ({"settings": {}}, "must have the keys"),
    ],
)
def test_scores_that_do_not_fit_are_refused(
    base: Path, scores: Path, tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    path = tmp_path / "scores.json"
    path.write_text(json.dumps({**json.loads(scores.read_text()), **change}))
    with pytest.raises(ModelError, match=told):
        load_scores(path, load(base, "causal-lm").model)
