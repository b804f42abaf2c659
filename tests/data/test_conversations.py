"""Instruction data: every form of row becomes conversations, and nothing else does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedsplit.data import load_dataset, load_splits
from fedsplit.data.conversations import conversations_of, from_text, to_text
from fedsplit.errors import DataError

SELF_INSTRUCT = Path(__file__).parents[2].parent / "shared" / "data" / "self_instruct"
ASKED = [("user", "Why?"), ("assistant", "So.")]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Why?", "completion": "So."}, [ASKED]),
        (
            {"prompt": [{"role": "system", "content": "Be brief."}], "completion": "So."},
            [[("system", "Be brief."), ("assistant", "So.")]],
        ),
        (
            {"messages": [{"role": r, "content": c} for r, c in ASKED], "id": 7},
            [ASKED],
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Why?"},
                    {"from": "gpt", "value": "So."},
                ]
            },
            [ASKED],
        ),
        (
            {
                "instruction": "Add",
                "instances": [{"input": "1 1", "output": "2"}, {"input": "", "output": "3"}],
            },
            [
                [("user", "Add\n\n1 1"), ("assistant", "2")],
                [("user", "Add"), ("assistant", "3")],
            ],
        ),
        ({"instruction": "Why?", "input": "", "output": "So."}, [ASKED]),
        ({"question": "Why?", "answers": ["So.", "Because."]}, [ASKED]),
        ({"question": "Why?", "choices": ["No.", "So."], "answer": 1}, [ASKED]),
    ],
)
def test_forms(row: dict[str, Any], expected: list[Any]) -> None:
    found = list(conversations_of("f:1", row))
    assert found == expected
    assert [from_text(to_text(one)) for one in found] == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "f:1: columns text: must have messages, prompt and completion"),
        ({"messages": "a"}, "messages='a': must be a list"),
        ({"messages": [["user", "a"]]}, "must be an object"),
        ({"messages": []}, r"0 messages: must be in \[1"),
        ({"messages": [{"role": "root", "content": "a"}]}, "role='root': must be one of"),
        ({"messages": [{"role": "user", "content": "a"}]}, "last role='user': must be assistant"),
        ({"prompt": "a", "completion": " "}, "assistant's content is blank"),
        ({"prompt": "a", "completion": None}, "content=None: must be a text"),
        ({"instruction": "a", "instances": []}, r"instances=\[\]: must be a list"),
        ({"instruction": 3, "output": "a"}, "must be texts"),
        ({"question": "a", "answers": []}, "content=None: must be a text"),
        ({"question": "a", "choices": ["b"], "answer": 1}, "answer=1: must be a number in 0..0"),
    ],
)
def test_malformed_rows_are_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(conversations_of("f:1", row))


def test_files_become_conversations_with_their_columns(tmp_path: Path) -> None:
    rows = [
        {"instruction": "A", "instances": [{"output": "1"}, {"output": "2"}], "who": "ann"},
        {"instruction": "B", "instances": [{"output": "3"}], "who": "bob"},
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "test.csv").write_text("prompt,completion,who\nC,4,ann\n")
    train, test = load_splits("instructions", path=str(tmp_path), label_column="", columns=("who",))
    assert train.chat
    assert train.columns["who"] == ("ann", "ann", "bob")
    assert from_text(train.texts[1]) == [("user", "A"), ("assistant", "2")]
    assert test is not None
    assert from_text(test.texts[0]) == [("user", "C"), ("assistant", "4")]
    part = train.select([2, 0])
    assert part.chat
    plain = load_dataset("file", path=str(tmp_path), text_column="who", label_column="")
    assert not plain.chat
    with pytest.raises(DataError, match="label_column='who': must be ''"):
        load_dataset("instructions", path=str(tmp_path), label_column="who")


def test_parquet_rows_with_nested_messages(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    messages = [[{"role": r, "content": c} for r, c in ASKED]]
    parquet.write_table(pyarrow.table({"messages": messages}), tmp_path / "a.parquet")
    loaded = load_dataset("instructions", path=str(tmp_path / "a.parquet"), label_column="")
    assert from_text(loaded.texts[0]) == ASKED


@pytest.mark.skipif(not SELF_INSTRUCT.is_dir(), reason="no ../shared here")
def test_self_instruct() -> None:
    path = SELF_INSTRUCT / "seed_tasks.jsonl"
    loaded = load_dataset("instructions", path=str(path), label_column="")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(loaded) == sum(len(row["instances"]) for row in rows) >= 175
