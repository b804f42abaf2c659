"""Task files are data: they round-trip, and what could run something is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.errors import ConfigError, DataError
from fedsplit.evaluation.prompts import Prompt
from fedsplit.evaluation.task_files import find_tasks, read_task, write_tasks

ROWS: list[dict[str, Any]] = [
    {"question": "What is wet?", "choices": ["sand", "water"], "answer": 1},
    {"question": "Ü {{x}} {% y %}?", "choices": ["é", "b", "c"], "answer": 0},
]


def save(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    save(folder / "My-Quiz_test.jsonl", ROWS)
    save(folder / "My-Quiz_train.jsonl", ROWS[:1])
    save(folder / "open_test.jsonl", [{"question": "Who?", "answers": ["Ann Lee", "Bo", "Ann"]}])
    return folder


@pytest.fixture
def written(data: Path, tmp_path: Path) -> Path:
    """The YAML file of one task."""
    return write_tasks(data, tmp_path / "tasks")[0]


def test_data_alone_and_its_task_files_are_the_same_tasks(data: Path, tmp_path: Path) -> None:
    write_tasks(data, tmp_path / "tasks")

    for direct, read in zip(find_tasks(data), find_tasks(tmp_path / "tasks"), strict=True):
        assert (direct.name, direct.docs, direct.examples) == (read.name, read.docs, read.examples)
        assert (direct.prompt, direct.metrics) == (read.prompt, read.metrics)


def test_questions_keep_their_text_whatever_it_looks_like(data: Path) -> None:
    quiz = find_tasks(data / "My-Quiz_test.jsonl")[0]

    assert quiz.name == "my_quiz_local"
    assert quiz.prompt.fill(quiz.docs[1]) == "Question: Ü {{x}} {% y %}?\nAnswer:"
    assert quiz.docs[0]["choices"] == ["sand", "water"]


def test_of_right_answers_only_the_shortest_beginnings_count(data: Path) -> None:
    task = find_tasks(data / "open_test.jsonl")[0]

    assert task.docs[0]["choices"] == ["Ann", "Bo"]
    assert task.docs[0]["answer"] == [0, 1]
    assert task.metrics == ("exact_match",)


def test_csv_rows_are_those_of_json(tmp_path: Path, data: Path) -> None:
    lines = ["question,choices,answer", '"What is wet?","[""sand"", ""water""]",1']
    (tmp_path / "quiz_test.csv").write_text("\n".join(lines))

    assert find_tasks(tmp_path / "quiz_test.csv")[0].docs[0] == ROWS[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"doc_to_text": "{{ question.__class__.__mro__ }}"}, "doc_to_text"),
        ({"doc_to_text": "{% for i in range(9) %}x{% endfor %}"}, "doc_to_text"),
        ({"doc_to_text": "{{ missing }}"}, "missing"),
        ({"doc_to_choice": "{{ [1].append(2) }}"}, "doc_to_choice"),
        ({"process_docs": "x.f"}, "process_docs"),
        ({"include": "/etc/other.yaml"}, "include"),
        ({"unsafe_code": True}, "unsafe_code"),
        ({"dataset_path": "somebody/dataset"}, "dataset_path"),
        ({"dataset_kwargs": {"trust_remote_code": True}}, "dataset_kwargs"),
        ({"dataset_kwargs": {"data_files": {"test": "../a_test.jsonl"}}}, "data_files"),
        ({"dataset_kwargs": {"data_files": {"test": "https://a/b.jsonl"}}}, "data_files"),
        ({"metric_list": [{"metric": "somebody/metric", "aggregation": "mean"}]}, "metric"),
        ({"metric_list": ["acc"]}, "metric"),
        ({"output_type": "generate_until"}, "output_type"),
        ({"test_split": "validation"}, "validation"),
        ({"num_fewshot": -1}, "num_fewshot"),
        ({"num_fewshot": True}, "num_fewshot"),
        ({"task": "../x"}, "task"),
        ({"target_delimiter": 3}, "target_delimiter"),
    ],
)
def test_what_a_task_file_must_not_say(written: Path, change: dict[str, Any], said: str) -> None:
    config = yaml.safe_load(written.read_text())
    written.write_text(yaml.safe_dump({**config, **change}))

    with pytest.raises(DataError, match=said):
        read_task(written)


def test_code_in_a_task_file_is_refused_and_never_runs(written: Path) -> None:
    witness = written.parent / "ran"
    code = f"from pathlib import Path\nPath({str(witness)!r}).touch()\ndef f(doc): return []\n"
    (written.parent / "thing.py").write_text(code)
    written.write_text(written.read_text() + "process_docs: !function thing.f\n")

    with pytest.raises(DataError, match="must not name code"):
        read_task(written)
    assert not witness.exists()


def test_python_tags_are_refused_too(written: Path) -> None:
    written.write_text("task: !!python/object/apply:os.getcwd []\n")

    with pytest.raises(DataError, match="must not name code"):
        read_task(written)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"choices": ["a", "b"], "answer": 2}, "answer=2"),
        ({"choices": ["a", "b"], "answer": True}, "answer=True"),
        ({"choices": ["a", ""], "answer": 0}, "choices"),
        ({"choices": "ab", "answer": 0}, "choices"),
        ({"choices": [], "answer": 0}, "choices"),
        ({"answers": []}, "choices"),
        ({"answers": "x"}, "answers"),
        ({"question": "", "choices": ["a"], "answer": 0}, "question"),
    ],
)
def test_a_bad_row_is_named_with_its_line(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    path = save(tmp_path / "quiz_test.jsonl", [ROWS[0], {"question": "q", **row}])

    with pytest.raises(DataError, match=said) as caught:
        find_tasks(path)
    assert "quiz_test.jsonl:2" in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[1]", '"x"', ""])
def test_a_damaged_data_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "quiz_test.jsonl").write_text(text)

    with pytest.raises(DataError, match="quiz_test"):
        find_tasks(tmp_path)


@given(st.text(max_size=40))
def test_any_template_is_harmless_or_refused(text: str) -> None:
    """A prompt that is accepted shows fields and text: it is no longer than these together."""
    doc = {"question": "abc", "choices": ["x"]}
    try:
        shown = Prompt(text).fill(doc)
    except ConfigError:
        return
    assert len(shown) <= len(text) * 10


@pytest.mark.parametrize(
    "text",
    [
        "{{ question * 99999999 }}",
        "{{ ''.__class__ }}",
        "{{ question.upper() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% set a = 1 %}",
        "{% import 'x' as y %}",
        "{{ question | attr('__class__') }}",
        "{{ [question] | map('upper') }}",
        "{{ lipsum }}{{ range(9) }}",
        "x" * 5000,
    ],
)
def test_templates_that_do_more_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        Prompt(text)


def test_filters_and_items_of_fields() -> None:
    prompt = Prompt("{{ question | trim | upper }}: {{ choices[1] }}\n")

    assert prompt.fill({"question": " hi ", "choices": ["a", "b"]}) == "HI: b\n"


def test_a_folder_in_use_is_not_written_to(data: Path) -> None:
    with pytest.raises(DataError, match="empty"):
        write_tasks(data, data)
