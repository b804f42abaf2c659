"""``fedsplit evaluate --data``: scores of a run and its export are those of the usual libraries."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics
from typer.testing import CliRunner

from fedsplit.cli import app_cli
from fedsplit.commands.evaluation.labels import (
    Labelled,
    measure_labelled,
    read_labelled,
    tuned_model,
)
from fedsplit.config import RunConfig
from fedsplit.errors import ConfigError, DataError, ModelError
from fedsplit.models import load
from fedsplit.models.adapters.trainable import make_trainable, method_options
from fedsplit.models.splitting.halves import split
from fedsplit.models.trained.weights import described, save_trained
from fedsplit.models.trained.whole import whole_of_run
from fedsplit.owners.samples import tokenise_set
from fedsplit.settings import read_settings
from fedsplit.tasks import task_of
from tests.tiny_models import save_tiny_bert, save_tiny_llama

TAGS = ("O", "B-a", "I-a", "B-b", "I-b")
SETTINGS: dict[str, dict[str, Any]] = {
    "regression": {"model.label-range": "0,5"},
    "multi-label": {"model.labels": 3, "model.label-names": "art, law, sport"},
    "sequence-classification": {"model.labels": 2, "model.label-names": "no, yes"},
    "token-classification": {"model.labels": 5, "model.label-names": ",".join(TAGS)},
    "multiple-choice": {},
}


def _rows(task: str) -> list[dict[str, Any]]:
    draw = np.random.default_rng(0)
    found = []
    for i in range(50):
        words = [f"w{draw.integers(90)}" for _ in range(draw.integers(3, 9))]
        row: dict[str, Any] = {"text": " ".join(words)}
        if task == "regression":
            row["label"] = float(draw.integers(0, 11)) / 2
        elif task == "multi-label":
            row["label"] = [n for n in ("art", "law", "sport") if draw.random() < 0.4]
        elif task == "sequence-classification":
            row["label"] = ["no", "yes"][int(draw.random() < 0.3)]
        elif task == "token-classification":
            row = {"tokens": words, "ner_tags": [TAGS[draw.integers(5)] for _ in words]}
        else:
            row = {"question": row["text"], "choices": ["w1 w2", "w3", f"w{i}"]}
            row["answer"] = int(draw.integers(3))
        found.append(row)
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function from a task to (run's folder, its config, file with labels), made once."""
    known: dict[str, tuple[Path, RunConfig, Path]] = {}
    models = {
        "bert": save_tiny_bert(tmp_path_factory.mktemp("bert")),
        "llama": save_tiny_llama(tmp_path_factory.mktemp("llama")),
    }

    def make(task: str, method: str = "all") -> tuple[Path, RunConfig, Path]:
        if (key := f"{task} {method}") in known:
            return known[key]
        base = str(models["llama" if task == "multiple-choice" else "bert"])
        flat = {"model.name": base, "model.task": task, "model.max-tokens": 16, "split.k": 1}
        config = read_settings(flat | SETTINGS[task] | {"train.method": method})
        outputs = task_of(config).outputs
        loaded = load(base, task, num_labels=outputs)
        _, top = split(loaded.model, 1, verify=False)
        generator = torch.Generator().manual_seed(1)
        trained = make_trainable(top, method, **method_options(config.train))
        state = {n: p.detach().clone() for n, p in trained.state().items()}
        for tensor in state.values():
            tensor += 0.3 * torch.randn(tensor.shape, generator=generator)
        folder = tmp_path_factory.mktemp(task)
        save_trained(folder / "top.safetensors", state, {}, described(config, loaded.digest))
        path = folder / "held-out.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in _rows(task)))
        known[key] = folder, config, path
        return known[key]

    return make


def _given(task: str, path: Path) -> Labelled:
    columns = {"token-classification": ("tokens", "ner_tags")}.get(task, ("text", "label"))
    return Labelled(str(path), "", *columns)


def _pooled(folder: Path, config: RunConfig, given: Labelled) -> tuple[Any, Any, Any, Any]:
    """Return (task, samples, scores of each text, model): text by text, with no padding."""
    whole = whole_of_run(folder)
    texts, task, _ = read_labelled(given, config.model)
    samples = tokenise_set(
        whole.loaded.tokenizer, texts, task=task, max_tokens=16, every_choice=True
    )
    with torch.no_grad():
        rows = [whole.loaded.model(input_ids=ids[None]).logits[0] for ids in samples.ids]
    return task, samples, rows, whole.loaded.model


def _expected(task: Any, samples: Any, rows: list[torch.Tensor]) -> dict[str, float]:
    if task.name == "token-classification":
        from seqeval.metrics import f1_score

        true, told = [], []
        for own, scores in zip(samples.words.texts, rows, strict=True):
            best = scores.argmax(1)
            true.append([TAGS[tag] for _, tag in own.tolist()])
            told.append([TAGS[int(best[at])] if at >= 0 else "O" for at, _ in own.tolist()])
        return {
            "entity-f1": float(f1_score(true, told)),
            "word-accuracy": float(
                np.mean(
                    [
                        a == b
                        for x, y in zip(true, told, strict=True)
                        for a, b in zip(x, y, strict=True)
                    ]
                )
            ),
        }
    if task.name == "multiple-choice":
        nats = [
            -float(
                torch.nn.functional.cross_entropy(
                    scores[samples.predicting(slot)],
                    samples.ids[slot][1 + samples.predicting(slot)],
                    reduction="sum",
                )
            )
            for slot, scores in enumerate(rows)
        ]
        groups = np.split(np.array(nats), np.cumsum(samples.choices.sizes)[:-1])
        return {"choice-accuracy": float(np.mean([g[0] > g[1:].max() for g in groups]))}
    scores, labels = torch.stack(rows).double().numpy(), samples.labels.numpy()
    if task.name == "regression":
        told = np.clip(scores[:, 0], -1, 1) * 2.5 + 2.5
        true = labels.astype(float) * 2.5 + 2.5
        return {
            "pearson": float(stats.pearsonr(true, told)[0]),
            "spearman": float(stats.spearmanr(true, told)[0]),
            "r2": float(metrics.r2_score(true, told)),
            "rmse": float(metrics.root_mean_squared_error(true, told)),
        }
    if task.name == "multi-label":
        told, true = scores > 0, labels > 0
        return {
            "micro-f1": float(metrics.f1_score(true, told, average="micro", zero_division=0)),
            "macro-f1": float(metrics.f1_score(true, told, average="macro", zero_division=0)),
            "accuracy": float(metrics.accuracy_score(true, told)),
        }
    told = scores.argmax(1)
    return {
        "accuracy": float(metrics.accuracy_score(labels, told)),
        "macro-f1": float(metrics.f1_score(labels, told, average="macro", zero_division=0)),
        "mcc": float(metrics.matthews_corrcoef(labels, told)),
        "auc": float(metrics.roc_auc_score(labels, scores[:, 1] - scores[:, 0])),
    }


@pytest.mark.parametrize("task", list(SETTINGS))
def test_scores_of_a_run_and_of_its_export_are_the_usual_libraries(
    made: Any, task: str, tmp_path: Path
) -> None:
    folder, config, path = made(task)
    given = _given(task, path)
    expected = _expected(*_pooled(folder, config, given)[:3])

    found = measure_labelled(tuned_model(str(folder)), given)
    whole_of_run(folder).write(tmp_path)
    exported = measure_labelled(tuned_model(str(tmp_path / "model")), given)

    assert found["max-tokens"] == exported["max-tokens"] == 16
    for key, value in expected.items():
        assert found["scores"][key] == pytest.approx(value, abs=1e-5), key
        assert exported["scores"][key] == pytest.approx(value, abs=1e-5), key
    assert found["headline"] in found["scores"]
    assert not any(key.endswith("-error") for key in found["scores"])


def test_adapters_that_no_hugging_face_class_has_are_evaluated_too(
    made: Any, tmp_path: Path
) -> None:
    folder, _, path = made("sequence-classification", "adapter")
    given = Labelled(str(path))
    whole_of_run(folder).write(tmp_path)
    found = [measure_labelled(tuned_model(str(at)), given)["scores"] for at in (folder, tmp_path)]
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], abs=1e-6)
    (tmp_path / "adapter").rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="no readable adapter"):
        tuned_model(str(tmp_path))


def test_the_command_says_and_writes_the_scores(made: Any, tmp_path: Path) -> None:
    folder, _, path = made("sequence-classification")
    out = tmp_path / "figures.json"
    arguments = ["evaluate", str(folder), "--data", str(path), "--out", str(out)]
    done = CliRunner().invoke(app_cli, arguments, env={"COLUMNS": "100"})
    assert done.exit_code == 0, done.output
    assert "accuracy" in done.output
    assert "yes" in done.output
    written = json.loads(out.read_text())
    assert written["scores"]["texts"] == 50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere.jsonl"], r"nowhere\.jsonl"),
        (["--data", "{path}", "--label-column", "class"], r"column='class': is missing; found: te"),
        (["--data", "{path}", "--data-kind", "files"], r"--data-kind"),
        (
            ["--data", "{path}", "--classes", "a, b"],
            r"--classes='a, b': must be left out, or the r",
        ),
        (["--data", "{path}", "--classes", "a, b, c"], r"--classes=.*: must be 2 names"),
        (["--data", "{path}", "--max-tokens", "99"], r"--max-tokens=99: must be <= 40"),
        (["--data", "{path}", "--text", "{path}"], r"--data"),
        (["--data", "{path}", "--adapter", "x"], r"--adapter"),
    ],
)
def test_what_cannot_be_is_refused_by_name(made: Any, arguments: list[str], message: str) -> None:
    folder, _, path = made("sequence-classification")
    given = [part.replace("{path}", str(path)) for part in arguments]
    done = CliRunner().invoke(app_cli, ["evaluate", str(folder), *given])
    assert isinstance(done.exception, ConfigError | DataError), done.output
    assert pytest.raises

    assert re.search(message, str(done.exception))


def test_a_model_that_no_run_left_is_refused(made: Any, tmp_path: Path) -> None:
    _, config, _ = made("sequence-classification")
    with pytest.raises(ModelError, match="fedsplit export"):
        tuned_model(config.model.name)
    whole_of_run(made("regression")[0]).write(tmp_path)
    with pytest.raises(ConfigError, match="--base"):
        tuned_model(str(tmp_path), base=config.model.name)
