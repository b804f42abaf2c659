"""Text data sets: what is refused, and what a digest says."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from fedsplit.data import Table, TextDataset
from fedsplit.data.dataset import build
from fedsplit.data.labels import agreed_first, class_name, parse_class_names
from fedsplit.errors import ConfigError, DataError


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
        ((True, False, True), ("0", "1"), (1, 0, 1)),
        ((0, 2, 2), ("0", "2"), (0, 1, 1)),
    ],
)
def test_labels_become_indices_into_sorted_names(
    labels: tuple[str, ...], names: tuple[str, ...], indices: tuple[int, ...]
) -> None:
    table = Table(("x", "y", "z"), labels)
    assert agreed_first([table]) == names
    assert build(table, names).labels == indices


@pytest.mark.parametrize("labels", [(1, 0.5), ("1", "0.50"), (0, float("inf"))])
def test_fractional_label_is_refused(labels: tuple[object, ...]) -> None:
    table = Table(("x", "y"), labels)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"row 1: label=.*: must be a name or an integer"):
        agreed_first([table])


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ((1, 1.0, "1", "1 ", "1.0", " 1.", "+1", "1e0", True, "true", "True", "TRUE"), "1"),
        ((0, 0.0, -0.0, "0", "-0", False, "false"), "0"),
        ((-1, -1.0, "-1", "-1.0"), "-1"),
        ((0.5, "0.5", "0.50", ".5"), "0.5"),
        (("pos", " pos", "pos\t"), "pos"),
        (("007",), "007"),  # a code, no number
        ((None, "", "  "), ""),
    ],
)
def test_one_value_is_one_class_whatever_its_type(values: tuple[object, ...], name: str) -> None:
    assert {class_name(value) for value in values} == {name}  # type: ignore[arg-type]


@pytest.mark.parametrize("empty", [None, "", " ", float("nan"), "nan", "NaN", "null", "N/A", "NA"])
def test_an_empty_cell_is_no_class(empty: object) -> None:
    table = Table(("x", "y"), ("good", empty))  # type: ignore[arg-type]
    names = agreed_first([table])
    assert names == ("good",)
    with pytest.raises(DataError, match=r"row 1: label=.*the cell is empty"):
        build(table, names)
    if empty == "NA":  # Namibia
        assert build(table, agreed_first([table], ("EU", "NA", "good"))).labels == (2, 1)


def test_a_label_that_is_kept_back_is_no_class() -> None:
    table = Table(("x", "y", "z"), (1, -1, 0))
    with pytest.raises(DataError, match=r"row 1: label=-1.*data.test-split, data.test-path"):
        build(table, agreed_first([table]))
    assert build(table, agreed_first([table], ("-1", "0", "1"))).labels == (2, 0, 1)


def test_agreed_names_decide_the_index_and_others_follow() -> None:
    table = Table(("x", "y", "z"), ("pos", "neg", "odd"))
    names = agreed_first([table], ("neg", "neutral", "pos"))
    assert names == ("neg", "neutral", "pos", "odd")
    data = build(table, names)
    assert data.labels == (2, 0, 3)
    with pytest.raises(DataError, match="row 2: label='odd': must be one of the agreed classes"):
        data.within(names[:3])
    assert data.select([0, 1]).within(names[:3]).label_names == ("neg", "neutral", "pos")


def test_integers_below_the_number_of_classes_mean_themselves() -> None:
    table = Table(("x", "y", "z"), (0, "2", 2.0))
    assert agreed_first([table], classes=3) == ("0", "1", "2")
    assert build(table, agreed_first([table], classes=3)).labels == (0, 2, 2)
    assert agreed_first([table], classes=2) == ("0", "2")  # for the run to refuse


def test_names_from_a_setting() -> None:
    assert parse_class_names(" neg, pos ", "x") == ("neg", "pos")
    assert parse_class_names('["a, b", "c"]', "x") == ("a, b", "c")
    assert parse_class_names("", "x") == ()
    for bad in ("a,,b", "a,a", "1,1.0", "true,1", "[1]", "[", '["a"', "nan,"):
        with pytest.raises(ConfigError, match="x="):
            parse_class_names(bad, "x")


def test_blank_texts_go_only_where_there_are_no_labels() -> None:
    table = Table(("x", " ", "z"), (), {"n": (1, 2, 3)})
    assert build(table, ()).texts == ("x", "z")
    assert build(table, ()).columns == {"n": (1, 3)}
    with pytest.raises(DataError, match="row 1"):
        build(Table(("x", " "), ("a", "b")), ("a", "b"))
