"""Prompts and answers from the running interpreter's own docstrings."""

from __future__ import annotations

import importlib
import inspect

import pytest

from fedsplit.data import docstrings_are_public, load_dataset, load_splits
from fedsplit.data.conversations import from_text
from fedsplit.data.docstring_questions import MAX_WORDS, MIN_WORDS, first_sentence, question
from fedsplit.errors import DataError

KIND = "docstring-questions"


def test_every_sample_is_a_question_with_one_sentence() -> None:
    dataset = load_dataset(KIND, label_column="")
    assert dataset.chat
    assert len(dataset) > 2000
    pairs = [from_text(text) for text in dataset.texts]
    assert len({answer.casefold() for _, (_, answer) in pairs}) == len(pairs)
    for asked, answered in pairs:
        assert [asked[0], answered[0]] == ["user", "assistant"]
        assert asked[1].startswith("What does Python's ")
        assert MIN_WORDS <= len(answered[1].split()) <= MAX_WORDS
        assert "\n" not in answered[1]
        name = asked[1].removeprefix("What does Python's ").removesuffix(" do?")
        assert not any(part.startswith("_") for part in name.split("."))


def test_answers_are_what_the_modules_themselves_say() -> None:
    """An independent reading: import the module and ask it."""
    dataset = load_dataset(KIND, label_column="")
    answers = {a[1]: b[1] for a, b in map(from_text, dataset.texts)}
    found = 0
    for module in ("textwrap", "statistics", "fractions", "heapq", "shutil", "csv"):
        loaded = importlib.import_module(module)
        for name, thing in inspect.getmembers(loaded, inspect.isfunction):
            answer = answers.get(question(f"{module}.{name}"))
            if answer is not None and thing.__module__ == module:
                assert " ".join(str(inspect.getdoc(thing)).split()).startswith(answer)
                found += 1
    assert found > 20


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return the sum of a list. More follows.", "Return the sum of a list."),
        ("Wrap a text\n    over two lines.\n\nMore follows here.", "Wrap a text over two lines."),
        ("Return pi, about 3.14, as a float.", "Return pi, about 3.14, as a float."),
        ("Too short.", ""),
        ("lower case is a fragment of something.", ""),
        ("copy(x) -> a shallow copy of x", ""),
        ("No full stop anywhere in it", ""),
        ("Return " + "very " * 40 + "much.", ""),
        ("", ""),
    ],
)
def test_first_sentence(docstring: str, sentence: str) -> None:
    assert first_sentence(docstring) == sentence


def test_owners_by_module_share_nothing() -> None:
    train, test = load_splits(KIND, label_column="", columns=("group",), limit=200, seed=1)
    assert test is None
    assert len(train) == 200
    assert len(set(train.columns["group"])) > 20
    again, _ = load_splits(KIND, label_column="", columns=("group",), limit=200, seed=1)
    assert train.digest == again.digest


def test_the_interpreters_docstrings_are_not_public_beside_them() -> None:
    assert not docstrings_are_public(KIND)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"path": "x.txt"}, "path='x.txt': must be empty"),
        ({"label_column": "label"}, "label_column='label': must be empty"),
        ({"columns": ("kind",)}, "column='kind': is missing; found: group"),
    ],
)
def test_what_it_does_not_have_is_refused(asked: dict[str, object], told: str) -> None:
    with pytest.raises(DataError, match=told):
        load_dataset(KIND, **{"label_column": "", **asked})  # type: ignore[arg-type]
