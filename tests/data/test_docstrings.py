"""The default data set, read from the running interpreter."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from fedsplit.data import Table, TextDataset, docstrings, load_dataset, load_splits, partition
from fedsplit.data.areas import AREAS
from fedsplit.data.dataset import build
from fedsplit.data.docstrings import MAX_WORDS, _collect, clean
from fedsplit.data.labels import agreed_first
from fedsplit.errors import DataError


@pytest.fixture(scope="module")
def dataset() -> TextDataset:
    return load_dataset("docstrings")


def test_counts_and_balance(dataset: TextDataset) -> None:
    assert dataset.label_names == tuple(sorted(AREAS))
    assert len(dataset.label_names) == 8
    assert len(dataset) > 4000  # 4,636 on a distribution without tkinter and idlelib
    assert 0.15 < dataset.label_counts().max() / len(dataset) < 0.25
    assert dataset.label_counts().min() > 100


@pytest.mark.skipif(sys.version_info[:3] != (3, 11, 7), reason="counts are of CPython 3.11.7")
def test_counts_of_the_documented_version(dataset: TextDataset) -> None:
    if {"tkinter", "idlelib", "distutils"} <= set(dataset.columns["group"]):
        assert len(dataset) == 5667
        assert dataset.label_counts().tolist() == [1168, 524, 740, 533, 559, 606, 812, 725]
        assert dataset.label_counts().max() / len(dataset) == pytest.approx(0.2061, abs=1e-4)


def test_texts_are_distinct_prose_on_one_line(dataset: TextDataset) -> None:
    assert len({text.casefold() for text in dataset.texts}) == len(dataset)
    assert all(len(text.split()) <= MAX_WORDS for text in dataset.texts)
    assert not any("\n" in text or "  " in text for text in dataset.texts)
    assert sum(">>>" in text for text in dataset.texts) <= len(dataset) // 100


def test_a_group_has_one_area(dataset: TextDataset) -> None:
    groups: dict[object, set[int]] = {}
    for group, label in zip(dataset.columns["group"], dataset.labels, strict=True):
        groups.setdefault(group, set()).add(label)
    assert len(groups) > 100
    assert all(len(labels) == 1 for labels in groups.values())
    assert set(dataset.columns["kind"]) == {"module", "class", "function"}


def test_owners_by_group_are_unlike_each_other(dataset: TextDataset) -> None:
    parts = partition(dataset, 4, "column", seed=0, column="group")
    shares = [dataset.select(part).label_counts() / len(part) for part in parts]
    distances = [abs(a - b).sum() / 2 for i, a in enumerate(shares) for b in shares[i + 1 :]]
    assert max(distances) > 0.3  # total variation


def test_modules_have_one_area_each() -> None:
    modules = [module for area in AREAS.values() for module in area]
    assert len(set(modules)) == len(modules)
    assert not {"test", "site-packages", "antigravity"} & set(modules)


def test_another_process_reads_the_same_and_imports_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = (
        "import sys\n"
        "from fedsplit.data import docstrings, load_dataset\n"
        "docstrings.AREAS = {'networking': ('http', 'xmlrpc'), 'text and markup': ('mailbox',)}\n"
        "part = load_dataset('docstrings')\n"
        "assert not {'mailbox', 'xmlrpc', 'datasets', 'flwr_datasets'} & set(sys.modules)\n"
        "print(part.digest)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    areas = {"networking": ("http", "xmlrpc"), "text and markup": ("mailbox",)}
    monkeypatch.setattr(docstrings, "AREAS", areas)
    texts, labels, groups, kinds = _collect.__wrapped__(sysconfig.get_path("stdlib"))
    table = Table(texts, labels, {"group": groups, "kind": kinds})
    assert done.stdout.strip() == build(table, agreed_first([table])).digest


def test_parts_that_a_distribution_lacks_are_not_missed(tmp_path: Path) -> None:
    (tmp_path / "heapq.py").write_text(
        '"""A heap is a list that keeps its own smallest item first."""'
    )
    (tmp_path / "json" / "tests").mkdir(parents=True)
    (tmp_path / "json" / "__init__.py").write_text(
        "class A:\n    '''Turn objects into text and text into objects, both ways.'''\n"
    )
    (tmp_path / "json" / "tests" / "a.py").write_text(
        '"""One two three four five six seven eight."""'
    )
    (tmp_path / "http.py").write_text("def broken(:\n    '''x'''\n")
    texts, areas, groups, kinds = _collect.__wrapped__(str(tmp_path))
    assert groups == ("heapq", "json")
    assert areas == ("data types and maths", "text and markup")
    assert kinds == ("module", "class")
    assert texts[1] == "Turn objects into text and text into objects, both ways."


def test_no_sources(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="comes without its source files"):
        _collect.__wrapped__(str(tmp_path))


def test_clean() -> None:
    docstring = "Add\n two numbers.\n\n>>> add(1, 2)\n3\n\nOverflow wraps.\n\n" + "word " * 80
    assert clean(docstring) == "Add two numbers. Overflow wraps."
    assert len(clean("word " * 80).split()) == MAX_WORDS
    assert clean("    >>> 1\n    1") == ""


def test_without_labels_and_splits() -> None:
    train, test = load_splits("docstrings", label_column="", limit=50, seed=1)
    assert test is None
    assert len(train) == 50
    assert train.labels == train.label_names == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "x"}, "path='x': must be empty"),
        ({"label_column": "topic"}, "label_column='topic'"),
        ({"split": "test"}, "split='test': must be one of train"),
        ({"columns": ("author",)}, "column='author': is missing; found: group, kind"),
    ],
)
def test_what_the_docstrings_lack(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_dataset("docstrings", **arguments)  # type: ignore[arg-type]
