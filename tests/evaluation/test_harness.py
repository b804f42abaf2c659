"""Tasks through lm-evaluation-harness score what one would score by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("lm_eval")

from fedsplit.errors import ConfigError, DataError
from fedsplit.evaluation.harness import TaskScore, mean_interval, run_tasks
from fedsplit.evaluation.likelihood import Likelihood
from fedsplit.evaluation.task_files import find_tasks, write_tasks
from fedsplit.models import load
from tests.tiny_models import WORDS


@pytest.fixture(scope="module")
def loaded(llama: Path) -> Any:
    return load(llama, "causal-lm")


@pytest.fixture
def quiz(tmp_path: Path) -> Path:
    """Forty questions with three answers of different lengths, and open ones."""
    rng = np.random.default_rng(0)

    def words(n: int) -> str:
        return " ".join(rng.choice(WORDS, n))

    folder = tmp_path / "data"
    folder.mkdir()
    for split, count in (("test", 40), ("train", 8)):
        rows = [
            {
                "question": words(1 + int(rng.integers(1, 5))),
                "choices": [words(int(n)) for n in rng.integers(1, 6, 3)],
                "answer": int(rng.integers(3)),
            }
            for _ in range(count)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"quiz_{split}.jsonl").write_text(text)
    return folder


def by_hand(loaded: Any, context: str, answer: str) -> float:
    """Summed log-likelihood of ``answer`` after ``context``: one plain forward pass."""

    def ids(text: str) -> list[int]:
        return list(loaded.tokenizer(text)["input_ids"][:-1])  # without the closing [SEP]

    whole, start = ids(f"{context} {answer}"), len(ids(context))
    with torch.no_grad():
        logits = loaded.model(torch.tensor([whole]), use_cache=False).logits[0]
    log_p = torch.log_softmax(logits.double(), -1)
    return sum(float(log_p[i - 1, whole[i]]) for i in range(start, len(whole)))


def metric(scores: list[TaskScore], name: str) -> TaskScore:
    return next(s for s in scores if s.metric == name)


def test_accuracy_is_that_of_the_likeliest_answer_and_of_its_mean_over_characters(
    loaded: Any, quiz: Path
) -> None:
    (task,) = find_tasks(quiz)
    right, right_norm = [], []
    for doc in task.docs:
        context = f"Question: {doc['question']}\nAnswer:"
        nats = [by_hand(loaded, context, choice) for choice in doc["choices"]]
        each = [n / len(choice) for n, choice in zip(nats, doc["choices"], strict=True)]
        right.append(int(np.argmax(nats)) == doc["answer"])
        right_norm.append(int(np.argmax(each)) == doc["answer"])

    scores = run_tasks(Likelihood(loaded.model), loaded.tokenizer, [task])

    assert metric(scores, "acc").value == pytest.approx(np.mean(right))
    assert metric(scores, "acc_norm").value == pytest.approx(np.mean(right_norm))
    assert {s.n for s in scores} == {40}
    assert metric(scores, "acc").chance == pytest.approx(1 / 3)
    for score in scores:
        assert score.interval is not None
        assert score.interval[0] < score.value < score.interval[1]


def test_examples_come_before_the_question_and_limit_counts_questions(
    loaded: Any, quiz: Path
) -> None:
    tasks = find_tasks(quiz)
    seen: list[int] = []

    def run(shots: int | None, seed: int = 0) -> list[TaskScore]:
        likelihood = Likelihood(loaded.model)
        found = run_tasks(likelihood, loaded.tokenizer, tasks, limit=5, shots=shots, seed=seed)
        seen.append(likelihood.forwarded)
        return found

    zero, two, again = run(None), run(2), run(2)

    assert {s.n for s in zero} == {5}
    assert {s.shots for s in zero} == {0}
    assert {s.shots for s in two} == {2}
    assert seen[1] > seen[0]
    assert two == again


def test_the_harness_itself_agrees_on_the_files_written_for_it(
    loaded: Any, quiz: Path, tmp_path: Path
) -> None:
    from lm_eval import evaluator
    from lm_eval.api.task import ConfigurableTask

    from fedsplit.evaluation.harness_model import HarnessModel

    (path,) = write_tasks(quiz, tmp_path / "tasks")
    config = yaml.safe_load(path.read_text())
    files = config["dataset_kwargs"]["data_files"]
    absolute = {split: str(path.parent / name) for split, name in files.items()}
    config["dataset_kwargs"] = {"data_files": absolute, "cache_dir": str(tmp_path / "cache")}
    theirs = ConfigurableTask(config=config)
    theirs.set_config(key="num_fewshot", value=0)
    theirs.set_fewshot_seed(seed=0)
    model = HarnessModel(Likelihood(loaded.model), loaded.tokenizer)

    expected = evaluator.evaluate(
        model, {"tasks": {theirs.task_name: theirs}}, bootstrap_iters=0, log_samples=False
    )["results"][theirs.task_name]

    for score in run_tasks(Likelihood(loaded.model), loaded.tokenizer, find_tasks(path)):
        assert score.value == pytest.approx(expected[f"{score.metric},none"])


def test_an_open_question_is_right_if_any_answer_is_what_greedy_decoding_says(
    loaded: Any, tmp_path: Path
) -> None:
    ids = loaded.tokenizer("Question: w1 w2\nAnswer:")["input_ids"][:-1]
    with torch.no_grad():
        best = int(loaded.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
    said = loaded.tokenizer.convert_ids_to_tokens(best)
    other = next(word for word in WORDS if not word.startswith(said))
    rows = [{"question": "w1 w2", "answers": a} for a in ([said, other], [other])]
    (tmp_path / "open_test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    (score,) = run_tasks(Likelihood(loaded.model), loaded.tokenizer, find_tasks(tmp_path))

    assert (score.metric, score.value, score.chance) == ("exact_match", 0.5, None)


def test_texts_and_generation_of_the_harness_own_tasks(loaded: Any) -> None:
    from lm_eval.api.instance import Instance

    from fedsplit.evaluation.harness_model import HarnessModel

    model = HarnessModel(Likelihood(loaded.model, max_length=8), loaded.tokenizer)
    text = "w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 w11"
    rolling = Instance("loglikelihood_rolling", {}, (text,), 0)
    until = Instance("generate_until", {}, ("w1 w2", {"until": ["w"], "max_gen_toks": 5}), 0)
    sampled = Instance("generate_until", {}, ("w1", {"do_sample": True}), 0)

    (nats,) = model.loglikelihood_rolling([rolling])

    assert nats < 0
    assert "w" not in model.generate_until([until])[0]
    with pytest.raises(ConfigError, match="greedy"):
        model.generate_until([sampled])


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"limit": 0}, "limit=0"), ({"shots": -1}, "shots=-1"), ({"shots": 8}, "must be > shots=8")],
)
def test_numbers_out_of_range(loaded: Any, quiz: Path, settings: dict[str, int], said: str) -> None:
    with pytest.raises((ConfigError, DataError), match=said):
        run_tasks(Likelihood(loaded.model), loaded.tokenizer, find_tasks(quiz), **settings)


def test_tasks_are_named_once(loaded: Any, quiz: Path) -> None:
    with pytest.raises(ConfigError, match="named once"):
        run_tasks(Likelihood(loaded.model), loaded.tokenizer, find_tasks(quiz) * 2)


@given(st.lists(st.booleans(), min_size=1, max_size=50))
def test_the_interval_of_a_share_is_inside_zero_and_one_and_never_empty(hits: list[bool]) -> None:
    mean, (low, high) = mean_interval(np.asarray(hits, dtype=np.float64))

    assert 0 <= low <= mean <= high <= 1
    assert high - low > 0.05
