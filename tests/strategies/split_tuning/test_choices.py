"""Multiple choice by likelihood in whole runs: training, counts of questions, a reference."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsplit.data.choices import from_text
from fedsplit.data.table import SEPARATOR
from fedsplit.errors import DataError
from fedsplit.evaluation.likelihood import Likelihood
from fedsplit.owners.split.schedule import evaluation_steps
from fedsplit.tasks import ChoiceGroups, task_type
from simulations.core.owner_samples import owner_samples
from simulations.split.centralised import CentralisedTwin
from strategies.base_model import load_base

TASK = task_type("multiple-choice")


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    draw = random.Random(5)

    def words(most: int) -> str:
        return " ".join(f"w{draw.randrange(70)}" for _ in range(draw.randint(1, most)))

    rows = []
    for _ in range(45):
        choices = [words(3) for _ in range(draw.choice([2, 4]))]
        answer = draw.randrange(len(choices))
        rows.append({"question": words(5), "choices": choices, "answer": "ABCD"[answer]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def asking(make_config: Any, questions: Path, tiny_llama: Path) -> Any:
    def make(**overrides: Any) -> Any:
        return make_config(
            **{
                "model__name": str(tiny_llama),
                "model__task": "multiple-choice",
                "data__kind": "choices",
                "data__path": str(questions),
                "split__k": 1,
                **overrides,
            }
        )

    return make


@pytest.mark.parametrize("transport", ["stream", "messages"])
def test_a_federation_is_its_centralised_twin(
    asking: Any, run_locally: Any, transport: str
) -> None:
    config = asking(session__transport=transport)
    run = run_locally(config)
    twin = CentralisedTwin(config, owner_samples(config, load_base(config).tokenizer))

    report = twin.run([row["train"]["waves"] for row in run.server["rounds"]])

    evaluated = run.server["rounds"][-1]["evaluate"]["metrics"]
    for key, value in report.metrics.items():
        assert evaluated[key] == pytest.approx(value, rel=1e-3), key
    assert report.loss < report.zero_shot_loss
    assert {"choice-accuracy", "choice-accuracy-norm"} <= evaluated.keys()
    assert evaluated["questions"] == sum(
        len(set(share.test.choices.questions.tolist())) for share in twin.owners.values()
    )


def test_counts_are_those_of_the_whole_models_likelihoods(asking: Any, run_locally: Any) -> None:
    config = asking(train__rounds=1, train__max_steps=1, train__lr=1e-8)
    run = run_locally(config)
    loaded = load_base(config)
    shares = owner_samples(config, loaded.tokenizer)
    right = [0, 0]
    whole = 0
    for share in shares:
        held = share.test
        assert held.choices is not None
        assert held.completions is not None
        likelihood = Likelihood(loaded.model)
        pairs = []
        for ids, flags in zip(held.ids, held.completions, strict=True):
            first = int(flags.nonzero()[0])
            pairs.append((tuple(ids[:first].tolist()), tuple(ids[first:].tolist())))
        nats = [score.nats for score in likelihood.score(pairs)]
        at = 0
        for size in held.choices.sizes:
            own = nats[at : at + size]
            lengths = held.choices.characters[at : at + size].tolist()
            each = [n / length for n, length in zip(own, lengths, strict=True)]
            right[0] += own[0] > max(own[1:])
            right[1] += each[0] > max(each[1:])
            whole += 1
            at += size

    evaluated = run.server["rounds"][-1]["evaluate"]["metrics"]

    assert evaluated["questions"] == whole
    assert evaluated["choice-accuracy"] == pytest.approx(right[0] / whole)
    assert evaluated["choice-accuracy-norm"] == pytest.approx(right[1] / whole)


def test_training_shows_the_right_choice_alone(asking: Any) -> None:
    config = asking()
    loaded = load_base(config)

    for share in owner_samples(config, loaded.tokenizer):
        assert share.train.choices is None
        assert share.test.choices is not None
        assert len(share.test) == sum(share.test.choices.sizes) > len(share.test.choices.sizes)


@pytest.mark.parametrize(("kind", "task"), [("file", "multiple-choice"), ("choices", "causal-lm")])
def test_a_task_and_data_of_another_form_are_refused(
    asking: Any, texts: Path, kind: str, task: str
) -> None:
    path = {"data__path": str(texts)} if kind == "file" else {}
    config = asking(data__kind=kind, model__task=task, **path)

    with pytest.raises(DataError, match=r"questions with choices|other than choices"):
        owner_samples(config, load_base(config).tokenizer)


def test_a_tie_is_no_right_answer_and_length_counts() -> None:
    # Three choices of 1, 1 and 2 tokens; then two that are equally likely.
    scores = torch.log(
        torch.tensor([[0.5, 0.5], [0.4, 0.6], [0.7, 0.3], [0.7, 0.3], *[[0.5] * 2] * 2])
    )
    about = ChoiceGroups(torch.tensor([4, 4, 4, 9, 9]), torch.tensor([1, 1, 2, 1, 1]))

    found = TASK(None).count(scores, torch.zeros(6, dtype=torch.int64), [1, 1, 2, 1, 1], about)

    # ln 0.5 > ln 0.4 and > 2 ln 0.7 (= ln 0.49); per character 2 ln 0.7 / 2 = ln 0.7 wins.
    assert found == {"choices-0": 1.0, "choices-1": 0.0, "choices-2": 2.0}
    assert TASK(None).scores(found) == {
        "choice-accuracy": 0.5,
        "choice-accuracy-norm": 0.0,
        "questions": 2.0,
    }
    assert TASK(None).averaged(about) == [True, False, False, True, False]


def test_questions_are_never_cut_in_two() -> None:
    steps = evaluation_steps(14, 2, [3, 3, 1, 7])

    assert [step.tolist() for step in steps] == [
        [0, 1, 2],
        [3, 4, 5, 6],
        [7, 8, 9, 10, 11, 12, 13],
    ]


def test_a_text_that_is_no_question_is_refused() -> None:
    with pytest.raises(DataError, match="must be a question with two choices or more"):
        from_text(f"only{SEPARATOR}one")
