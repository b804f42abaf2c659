"""Questions with choices: the shapes of public sets, and answers of every kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedsplit.data import choices
from fedsplit.data.choices import Question, from_text, question_of, to_parts
from fedsplit.data.table import Request, join_parts
from fedsplit.errors import DataError

ASKED = Question("What is wet?", ("sand", "water", "fire"), 1)
SHARED = Path(__file__).parents[2].parent / "shared/data/qa"


@pytest.mark.parametrize(
    "row",
    [
        {"question": "What is wet?", "choices": ["sand", "water", "fire"], "answer": 1},
        {"question": "What is wet?", "choices": ["sand", "water", "fire"], "answer": 1.0},
        {"question": "What is wet?", "choices": ["sand", "water", "fire"], "answer": "B"},
        {"question": "What is wet?", "choices": ["sand", "water", "fire"], "answer": "b "},
        {"question": "What is wet?", "choices": ["sand", "water", "fire"], "answer": "1"},
        {"question": "What is wet?", "choices": ["sand", "water", "fire"], "answer": "water"},
        {"question": "What is wet?", "choices": '["sand", "water", "fire"]', "answer": 1},
        {
            "question": "What is wet?",
            "choices": {"text": ["sand", "water", "fire"], "label": ["A", "B", "C"]},
            "answerKey": "B",
        },
        {  # ARC's labels that are digits count from 1
            "question": "What is wet?",
            "choices": {"text": ["sand", "water", "fire"], "label": ["1", "2", "3"]},
            "answerKey": "2",
        },
        {
            "question": {
                "stem": "What is wet?",
                "choices": [
                    {"text": "sand", "label": "A"},
                    {"text": "water", "label": "B"},
                    {"text": "fire", "label": "C"},
                ],
            },
            "answerKey": "B",
        },
        {"ctx": "What is wet?", "endings": ["sand", "water", "fire"], "label": "1"},
    ],
)
def test_every_shape_is_the_same_question(row: dict[str, Any]) -> None:
    assert question_of("here", row) == ASKED


def test_piqa_has_two_solutions() -> None:
    row = {"goal": "dresser", "sol1": "replace", "sol2": "finish", "label": 1}

    assert question_of("here", row) == Question("dresser", ("replace", "finish"), 1)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"answer": 3}, "here: answer=3: must be a number in 0..2, one of A, B, C"),
        ({"answer": True}, "answer=True"),
        ({"answer": "D"}, "answer='D'"),
        ({"answer": 1.5}, "answer=1.5"),
        ({"answer": float("inf")}, "answer=inf"),
        ({"answer": -1}, "answers are kept back"),
        ({"answer": ""}, "answers are kept back"),
        ({"choices": []}, "choices=[]: must be 1 to 100 texts"),
        ({"choices": ["a", " "]}, "choices=['a', ' ']"),
        ({"choices": {"text": ["a", "b"], "label": ["A", "A"]}}, "labels of choices"),
        ({"question": None}, "question=None"),
    ],
)
def test_what_is_no_question_is_named(change: dict[str, Any], told: str) -> None:
    row = {"question": "q", "choices": ["a", "b", "c"], "answer": 0} | change

    with pytest.raises(DataError) as caught:
        question_of("here", row)

    assert told in str(caught.value)


def test_a_missing_column_lists_what_is_there() -> None:
    with pytest.raises(DataError, match="here: answer: is missing; found: question, choices"):
        question_of("here", {"question": "q", "choices": ["a", "b"]})
    with pytest.raises(DataError, match="here: choices: are missing; found: text"):
        question_of("here", {"text": "q"})


def test_a_file_becomes_texts_of_parts_with_the_right_choice_first(tmp_path: Path) -> None:
    row = {"question": "What is wet?", "choices": list(ASKED.choices), "answer": "B", "subject": 3}
    (tmp_path / "q.jsonl").write_text(json.dumps(row))

    table = choices.read(Request(str(tmp_path / "q.jsonl"), columns=("subject",)), "train")

    assert table.texts == (join_parts("", to_parts(ASKED)),)
    assert from_text(table.texts[0]) == (ASKED.question, ("water", "sand", "fire"))
    assert table.labels == ()
    assert table.choices
    assert table.columns == {"subject": (3,)}
    assert table.places[0].endswith("q.jsonl:1")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the question sets are not here")
@pytest.mark.parametrize(
    ("name", "questions"), [("ARC-Easy", 2376), ("openbookqa", 500), ("piqa", 1838)]
)
def test_public_sets_are_read_whole(name: str, questions: int) -> None:
    table = choices.read(Request(str(SHARED / f"{name}_test.jsonl")), "train")

    assert len(table.texts) == questions
