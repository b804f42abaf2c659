"""Texts whose words have tags: CoNLL files and rows with lists."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedsplit.data import tagged
from fedsplit.data.table import Request
from fedsplit.errors import DataError

WNUT = Path(__file__).parents[2].parent / "shared/data/wnut17"
WORDS = (("He", "lives", "in", "New", "York"), ("Bye",))
TAGS = (("O", "O", "O", "B-place", "I-place"), ("O",))


def _read(path: Path, split: str = "train", **asked: str) -> tuple[tuple[str, ...], object]:
    table = tagged.read(Request(str(path), **asked), split)
    return table.texts, table.labels


def _rows() -> list[dict[str, list[str]]]:
    return [{"tokens": list(w), "tags": list(t)} for w, t in zip(WORDS, TAGS, strict=True)]


FORMS = {
    "a.conll": "He\tO\nlives\tO\nin\tO\nNew\tB-place\nYork\tI-place\n\nBye\tO\n",
    "tab.conll": "He\tO\nlives\tO\nin\tO\nNew\tB-place\nYork\tI-place\n\t\nBye\tO",
    "crlf.iob": "He\tO\r\nlives\tO\r\nin\tO\r\nNew\tB-place\r\nYork\tI-place\r\n\r\n\r\nBye\tO\r\n",
    "four.txt": "-DOCSTART- -X- -X- O\n\nHe P B O\nlives V B O\nin I B O\nNew N B B-place\n"
    "York N I I-place\n\nBye N B O\n",
    "a.jsonl": "".join(json.dumps(row) + "\n" for row in _rows()),
    "json.csv": "tokens,tags\n" + "".join(
        ",".join('"' + json.dumps(row[key]).replace('"', '""') + '"' for key in ("tokens", "tags"))
        + "\n" for row in _rows()
    ),
    "python.csv": "tokens,tags\n" + "".join(
        f'"{row["tokens"]}","{row["tags"]}"\n' for row in _rows()
    ),
    "spaces.tsv": "tokens\ttags\n" + "".join(
        f"{' '.join(row['tokens'])}\t{' '.join(row['tags'])}\n" for row in _rows()
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_words_and_tags(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(FORMS[name], newline="")

    assert _read(tmp_path / name) == (tuple(map(" ".join, WORDS)), TAGS)


def test_columns_of_a_conll_file_go_by_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text("1 He PRP O\n2 left VBD O\n")

    assert _read(tmp_path / "a.conll", text_column="2", label_column="3") == (
        ("He left",),
        (("PRP", "VBD"),),
    )


def test_texts_alone_are_those_of_a_file_without_tags(tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text("He\nleft\n\nBye\n")

    assert _read(tmp_path / "a.conll", label_column="") == (("He left", "Bye"), ())


def test_a_folder_has_the_splits_that_its_names_tell(tmp_path: Path) -> None:
    for name in ("train", "dev", "test"):
        (tmp_path / f"{name}.conll").write_text(f"{name} O\n")
    request = Request(str(tmp_path))

    assert tagged.splits(request) == ("train", "dev", "test")
    assert tagged.read(request, "dev").texts == ("dev",)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.conll", "He\tO\nleft\n", "a.conll:2: columns=1: must be 2"),
        ("a.conll", "He O x\nleft O\n", "a.conll:2: columns=2: must be 3"),
        ("a.conll", "He\n", "a.conll:1: columns=1: must be a word and its tag"),
        ("a.conll", "He\tO\n\tO\n", "a.conll:2: word=''"),
        ("a.jsonl", '{"tokens": ["a", "b"], "tags": ["O"]}', "a.jsonl:1: 1 tags: must be one for"),
        ("a.jsonl", '{"tokens": ["a b"], "tags": ["O"]}', "a.jsonl:1: word 1='a b'"),
        ("a.jsonl", '{"tokens": ["a", ""], "tags": ["O", "O"]}', "a.jsonl:1: word 2=''"),
        ("a.jsonl", '{"tokens": [], "tags": []}', "a.jsonl:1: words=0"),
        ("a.jsonl", '{"tokens": ["a"], "tags": [["O"]]}', "a.jsonl:1: tag=['O']"),
        ("a.jsonl", '{"tokens": 3, "tags": ["O"]}', "a.jsonl:1: tokens=3: must be a list"),
        ("a.jsonl", '{"tokens": ["a"]}', "a.jsonl:1: column='tags': is missing; found: tokens"),
        ("a.conll", "\n\n", "texts=0: must be >= 1"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, name: str, content: str, told: str) -> None:
    (tmp_path / name).write_text(content)

    with pytest.raises(DataError) as caught:
        _read(tmp_path / name)

    assert told in str(caught.value)


@pytest.mark.skipif(not WNUT.is_dir(), reason="the corpus is not here")
def test_wnut17_has_the_texts_and_entities_that_its_authors_count() -> None:
    request = Request(str(WNUT))
    sizes = {split: len(tagged.read(request, split).texts) for split in ("train", "dev", "test")}
    first = [tag.startswith("B-") for tags in tagged.read(request, "train").labels for tag in tags]

    assert sizes == {"train": 3394, "dev": 1009, "test": 1287}
    assert sum(first) == 1975  # Derczynski et al., W-NUT 2017, table 2
