"""Questions with choices, one of them right: the shapes that public sets have.

| columns of a row | answer |
| --- | --- |
| ``question``, ``choices`` (texts), ``answer`` | number of the choice from 0, its letter, or its own text |
| ``question``, ``choices`` (``{"text": [...], "label": [...]}``, or a list of such objects), ``answerKey`` | the choice's label |
| ``goal``, ``sol1``, ``sol2``, ``label`` (PIQA) | number from 0 |
| ``ctx``, ``endings``, ``label`` (HellaSwag) | number from 0 |

A row becomes one text of several parts (:func:`fedsplit.data.table.join_parts`): the question, the
right choice, then the others.  There is no label beside it: the text is what is learnt.
"""  # noqa: E501

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from fedsplit.data import files, hub
from fedsplit.data.table import SEPARATOR, Request, Source, Table, Value, join_parts
from fedsplit.errors import DataError

MOST_CHOICES = 100
ANSWERS = ("answer", "answerKey", "label", "gold")


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        question: what is asked.
        choices: texts of the answers to choose from.
        answer: number of the right one, from 0.
    """

    question: str
    choices: tuple[str, ...]
    answer: int


def question_of(where: str, row: Mapping[str, Any]) -> Question:
    """Return the question of a row of one of the table's shapes.

    Raises:
        DataError: no shape fits, or one does and is malformed, or the answer is kept back (-1, an
            empty cell); names the place.
    """
    asked, given = _asked(where, row)
    choices, labels = _choices(where, given)
    if not isinstance(asked, str) or not asked.strip():
        raise DataError(f"{where}: question={asked!r:.80}: must be a text")
    name = next((name for name in ANSWERS if name in row), None)
    if name is None:
        raise DataError(f"{where}: answer: is missing; found: {', '.join(map(str, row))}")
    return Question(asked, choices, _answer(f"{where}: {name}", row[name], choices, labels))


def is_question(row: Mapping[str, Any]) -> bool:
    """Whether a row has the columns of a question with choices."""
    shapes = ({"question", "choices"}, {"goal", "sol1", "sol2"}, {"ctx", "endings"})
    return any(shape <= row.keys() for shape in shapes)


def to_parts(question: Question) -> list[str]:
    """Return a question and its choices, the right one first, as the parts of one text."""
    others = [choice for at, choice in enumerate(question.choices) if at != question.answer]
    return [question.question, question.choices[question.answer], *others]


def from_text(text: str) -> tuple[str, tuple[str, ...]]:
    """Return (question, choices, the right one first) of a text that this source made.

    Raises:
        DataError: the text is none.
    """
    question, *choices = text.split(SEPARATOR)
    if len(choices) < 2:
        raise DataError(f"text {text!r:.60}: must be a question with two choices or more")
    return question, tuple(choices)


def _asked(where: str, row: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return (question, choices) as the row has them."""
    if {"goal", "sol1", "sol2"} <= row.keys():
        return row["goal"], [row["sol1"], row["sol2"]]
    if {"ctx", "endings"} <= row.keys():
        return row["ctx"], row["endings"]
    question = row.get("question")
    if isinstance(question, Mapping):  # ARC's own files
        return question.get("stem"), question.get("choices")
    if "choices" not in row:
        found = ", ".join(map(str, row))
        raise DataError(f"{where}: choices: are missing; found: {found}")
    return question, row["choices"]


def _choices(where: str, given: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return (texts, labels) of the choices; no labels where they have none."""
    labels: list[Any] = []
    if isinstance(given, str) and given.lstrip()[:1] in ("[", "{"):  # a cell of delimited text
        with contextlib.suppress(ValueError, RecursionError):
            given = json.loads(given)
    texts = given
    if isinstance(given, Mapping):
        texts, labels = given.get("text"), list(given.get("label") or [])
    elif isinstance(given, list) and given and all(isinstance(c, Mapping) for c in given):
        texts = [choice.get("text") for choice in given]
        labels = [choice.get("label") for choice in given]
    good = isinstance(texts, list) and all(isinstance(c, str) and c.strip() for c in texts)
    if not good or not 1 <= len(texts) <= MOST_CHOICES:
        raise DataError(f"{where}: choices={given!r:.80}: must be 1 to {MOST_CHOICES} texts")
    names = tuple(str(label).strip() for label in labels)
    if names and (len(names) != len(texts) or len(set(names)) != len(names)):
        raise DataError(
            f"{where}: labels of choices={labels!r:.80}: must be one for each, distinct"
        )
    return tuple(texts), names


def _answer(place: str, given: Any, choices: tuple[str, ...], labels: tuple[str, ...]) -> int:
    names = labels or tuple(ascii_uppercase[: len(choices)])
    bound = f"a number in 0..{len(choices) - 1}, one of {', '.join(names)}, or a choice's text"
    if isinstance(given, str):
        text = given.strip()
        if not labels and text.isdecimal():
            given = int(text)
        elif text in names:
            return names.index(text)
        elif not labels and text.upper() in names:
            return names.index(text.upper())
        elif choices.count(given) == 1:
            return choices.index(given)
    number = isinstance(given, int | float) and not isinstance(given, bool)
    number = number and (isinstance(given, int) or given.is_integer())
    if labels and number and str(int(given)) in labels:  # ARC's labels may be digits
        return labels.index(str(int(given)))
    if number and 0 <= given < len(choices) and not labels:
        return int(given)
    if given in (None, "", -1, "-1"):
        raise DataError(f"{place}={given!r}: must be {bound}; this split's answers are kept back")
    raise DataError(f"{place}={given!r:.60}: must be {bound}")


def splits(request: Request) -> tuple[str, ...]:
    """Return the splits at ``request.path``, a file, a folder, or a hub's ``owner/name``.

    Raises:
        DataError: see :func:`fedsplit.data.files.splits` and :func:`fedsplit.data.hub.splits`.
    """
    return files.splits(request) if files.is_there(request) else hub.splits(request)


def rows(request: Request, split: str) -> Iterator[files.Row]:
    """Yield the rows of one split, each with its place.

    Raises:
        DataError: see :func:`fedsplit.data.files.rows` and :func:`fedsplit.data.hub.rows`.
    """
    return files.rows(request, split) if files.is_there(request) else hub.rows(request, split)


def read(request: Request, split: str) -> Table:
    """Read one split; columns go by the table's names, whatever ``text_column`` says.

    Raises:
        DataError: as :func:`splits` and :func:`question_of`.
    """
    texts: list[str] = []
    places: list[str] = []
    columns: dict[str, list[Value]] = {column: [] for column in request.columns}
    for where, row in rows(request, split):
        question = question_of(where, row)
        if len(question.choices) < 2:
            raise DataError(f"{where}: choices={list(question.choices)!r:.80}: must be 2 or more")
        texts.append(join_parts(where, to_parts(question)))
        places.append(where)
        for column in request.columns:
            columns[column].append(files.value_of(where, row, column))
    if not texts:
        raise DataError(f"{request.path}: rows=0: must be >= 1")
    kept = {column: tuple(values) for column, values in columns.items()}
    return Table(tuple(texts), (), kept, request.path, choices=True, places=tuple(places))


SOURCE = Source(splits, read)
