"""Instruction data: prompts with completions, conversations by role, and nested instances.

Every sample becomes one text, its canonical form: a JSON list of ``[role, content]`` pairs.  That
text is what identifies the sample (splits, views and budgets count by it); how it is laid out for a
model is the tokenizer's chat template's matter (:mod:`fedsplit.models.chat_template`).

| columns of a row | conversation |
| --- | --- |
| ``messages`` (or ``conversations``) | a list of objects with ``role`` and ``content`` (or ``from`` and ``value``) |
| ``prompt``, ``completion`` | texts, or lists of such objects |
| ``instruction``, ``instances`` | one conversation for each instance's ``input`` and ``output`` |
| ``instruction``, ``input``, ``output`` | one conversation |
| ``question``, ``answers`` | the first answer completes |
| those of a question with choices (:mod:`fedsplit.data.choices`) | the right choice completes |
"""  # noqa: E501

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from fedsplit.data import files
from fedsplit.data.choices import is_question, question_of, rows, splits
from fedsplit.data.table import Request, Source, Table, Value
from fedsplit.errors import DataError

Message = tuple[str, str]  # (role, content)

ASSISTANT = "assistant"
ROLES = ("system", "user", ASSISTANT, "tool")
_OTHER_NAMES = {"human": "user", "gpt": ASSISTANT, "bot": ASSISTANT, "model": ASSISTANT}
MOST_MESSAGES = 256


def to_text(messages: list[Message]) -> str:
    """Return the canonical text of a conversation."""
    return json.dumps(messages, ensure_ascii=False, separators=(",", ":"))


def from_text(text: str) -> list[Message]:
    """Return the conversation that :func:`to_text` wrote.

    Raises:
        DataError: the text is none.
    """
    try:
        pairs = json.loads(text)
        return _checked("conversation", [(role, content) for role, content in pairs])
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"text {text!r:.60}: must be a conversation ({error})") from None


def conversations_of(where: str, row: Mapping[str, Any]) -> Iterator[list[Message]]:
    """Yield the conversations of one row.

    Raises:
        DataError: no form of the table above fits, or one does and is malformed; names the place.
    """
    for key in ("messages", "conversations"):
        if key in row:
            yield _checked(where, _messages(where, key, row[key]))
            return
    if {"prompt", "completion"} <= row.keys():
        before = _side(where, row, "prompt", "user")
        yield _checked(where, [*before, *_side(where, row, "completion", ASSISTANT)])
    elif {"instruction", "instances"} <= row.keys():
        instances = row["instances"]
        if not isinstance(instances, list) or not instances:
            raise DataError(f"{where}: instances={instances!r:.60}: must be a list of objects")
        for instance in instances:
            if not isinstance(instance, Mapping):
                raise DataError(f"{where}: instances: {instance!r:.60}: must be an object")
            yield _instructed(where, row["instruction"], instance)
    elif {"instruction", "output"} <= row.keys():
        yield _instructed(where, row["instruction"], row)
    elif {"question", "answers"} <= row.keys() and isinstance(row["answers"], list):
        answer = row["answers"][0] if row["answers"] else None
        yield _checked(where, [("user", row["question"]), (ASSISTANT, answer)])
    elif is_question(row):
        asked = question_of(where, row)
        right = asked.choices[asked.answer]
        yield _checked(where, [("user", asked.question), (ASSISTANT, right)])
    else:
        raise DataError(
            f"{where}: columns {', '.join(map(str, row))}: must have messages, prompt and "
            "completion, instruction and instances or output, or question and answers"
        )


def _instructed(where: str, instruction: Any, row: Mapping[str, Any]) -> list[Message]:
    given = row.get("input") or ""
    if not isinstance(given, str) or not isinstance(instruction, str):
        raise DataError(f"{where}: instruction and input: must be texts")
    asked = f"{instruction}\n\n{given}" if given.strip() else instruction
    return _checked(where, [("user", asked), (ASSISTANT, row.get("output"))])


def _side(where: str, row: Mapping[str, Any], key: str, role: str) -> list[tuple[Any, Any]]:
    value = row[key]
    return _messages(where, key, value) if isinstance(value, list) else [(role, value)]


def _messages(where: str, key: str, value: Any) -> list[tuple[Any, Any]]:
    if not isinstance(value, list):
        raise DataError(f"{where}: {key}={value!r:.60}: must be a list of messages")
    found = []
    for message in value:
        if not isinstance(message, Mapping):
            raise DataError(f"{where}: {key}: {message!r:.60}: must be an object")
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        found.append((_OTHER_NAMES.get(str(role), role), content))
    return found


def _checked(where: str, messages: list[tuple[Any, Any]]) -> list[Message]:
    if not 1 <= len(messages) <= MOST_MESSAGES:
        raise DataError(f"{where}: {len(messages)} messages: must be in [1, {MOST_MESSAGES}]")
    for role, content in messages:
        if role not in ROLES:
            raise DataError(f"{where}: role={role!r:.60}: must be one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise DataError(f"{where}: {role}'s content={content!r:.60}: must be a text")
        if role == ASSISTANT and not content.strip():
            raise DataError(f"{where}: {role}'s content is blank: must be a text")
    if messages[-1][0] != ASSISTANT:
        raise DataError(f"{where}: last role={messages[-1][0]!r}: must be {ASSISTANT}")
    return messages


def read(request: Request, split: str) -> Table:
    """Read one split: a row may give several samples, each with the row's further columns.

    Raises:
        DataError: as :func:`splits` and :func:`conversations_of`; labels cannot be asked for.
    """
    if request.label_column:
        raise DataError(
            f"label_column={request.label_column!r}: must be '' for instructions (causal-lm)"
        )
    texts: list[str] = []
    places: list[str] = []
    columns: dict[str, list[Value]] = {column: [] for column in request.columns}
    for where, row in rows(request, split):
        for messages in conversations_of(where, row):
            texts.append(to_text(messages))
            places.append(where)
            for column in request.columns:
                columns[column].append(files.value_of(where, row, column))
    if not texts:
        raise DataError(f"{request.path}: rows=0: must be >= 1")
    kept = {column: tuple(values) for column, values in columns.items()}
    return Table(tuple(texts), (), kept, request.path, chat=True, places=tuple(places))


SOURCE = Source(splits, read)
