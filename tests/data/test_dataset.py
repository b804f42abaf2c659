"""Text data sets: what is refused, and what a digest says."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from fedsplit.data import Table, TextDataset
from fedsplit.data.dataset import build, label_names
from fedsplit.errors import DataError


@pytest.fixture
def dataset() -> TextDataset:
    return TextDataset(
        texts=("one", "two", "three"),
        labels=(0, 1, 1),
        label_names=("even", "odd"),
        columns={"author": ("a", "b", "a"), "age": (1, None, 2.5)},
        name="numbers",
    )


def test_select_keeps_rows_together_and_in_order(dataset: TextDataset) -> None:
    part = dataset.select(np.array([2, 0]))
    assert part.texts == ("three", "one")
    assert part.labels == (1, 0)
    assert part.columns == {"author": ("a", "a"), "age": (2.5, 1)}
    assert part.label_names == dataset.label_names


def test_digest_is_of_the_content_only(dataset: TextDataset) -> None:
    reordered = {name: dataset.columns[name] for name in ("age", "author")}
    same = dataclasses.replace(dataset, name="other", columns=reordered)
    assert same.digest == dataset.digest
    assert dataset.select([0, 1, 2]).digest == dataset.digest
    assert len(dataset.digest) == 64


@pytest.mark.parametrize(
    "change",
    [
        {"texts": ("one", "two", "thre\u0065 ")},
        {"labels": (0, 1, 0)},
        {"label_names": ("odd", "even")},
        {"columns": {"author": ("a", "b", "a"), "age": (1, None, "2.5")}},
        {"columns": {"author": ("a", "b", "a")}},
        {"texts": ("one", 'two", "', "three")},
    ],
)
def test_any_change_of_content_changes_the_digest(
    dataset: TextDataset, change: dict[str, tuple[str, ...]]
) -> None:
    assert dataclasses.replace(dataset, **change).digest != dataset.digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": (0, 2, 1)}, r"numbers: row 1: label=2: must be an integer from 0 to 1"),
        ({"labels": (0, -1, 1)}, r"row 1: label=-1"),
        ({"labels": (0, None, 1)}, r"row 1: label=None"),
        ({"labels": (0, True, 1)}, r"row 1: label=True"),
        ({"labels": (0, 1)}, r"labels=2: must be one for each of 3 rows"),
        ({"labels": ()}, r"0 labels and 2 label names"),
        ({"label_names": ("x", "x")}, r"must be distinct"),
        ({"texts": ("one", " \n", "three")}, r"row 1: text=' \\n': must be a text that is not"),
        ({"texts": ("one", None, "three")}, r"row 1: text=None"),
        ({"texts": ("one", "a\ud800", "three")}, r"row 1: text has the lone surrogate '\\ud800'"),
        ({"texts": ()}, r"rows=0: must be >= 1"),
        ({"columns": {"age": (1, 2)}}, r"column 'age': 2 values: must be one for each of 3 rows"),
    ],
)
def test_malformed_rows_are_refused(
    dataset: TextDataset, change: dict[str, tuple[object, ...]], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        dataclasses.replace(dataset, **change)


@pytest.mark.parametrize("row", [-1, 3])
def test_select_out_of_range(dataset: TextDataset, row: int) -> None:
    with pytest.raises(DataError, match=f"row={row}: must be from 0 to 2"):
        dataset.select([row])


def test_frozen(dataset: TextDataset) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        dataset.name = "x"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("labels", "names", "indices"),
    [
        (("b", "a", "b"), ("a", "b"), (1, 0, 1)),
        (("10", "9", "9"), ("9", "10"), (1, 0, 0)),
        ((10, 9.0, "9"), ("9", "10"), (1, 0, 0)),
        ((True, False, True), ("false", "true"), (1, 0, 1)),
    ],
)
def test_labels_become_indices_into_sorted_names(
    labels: tuple[str, ...], names: tuple[str, ...], indices: tuple[int, ...]
) -> None:
    table = Table(("x", "y", "z"), labels)
    assert label_names([table]) == names
    assert build(table, names).labels == indices


def test_fractional_label_is_refused() -> None:
    with pytest.raises(DataError, match=r"row 1: label=0.5: must be a name or an integer"):
        label_names([Table(("x", "y"), (1, 0.5))])


def test_blank_texts_go_only_where_there_are_no_labels() -> None:
    table = Table(("x", " ", "z"), (), {"n": (1, 2, 3)})
    assert build(table, ()).texts == ("x", "z")
    assert build(table, ()).columns == {"n": (1, 3)}
    with pytest.raises(DataError, match="row 1"):
        build(Table(("x", " "), ("a", "b")), ("a", "b"))
