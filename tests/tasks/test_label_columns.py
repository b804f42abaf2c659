"""What a cell may hold for each task, and that a bad one is named by file and line."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from fedsplit.config import RunConfig
from fedsplit.data import load_dataset, load_splits, partition, train_test_split
from fedsplit.errors import ConfigError, DataError, PolicyError
from fedsplit.owners.class_names import agreed_classes
from fedsplit.owners.data_source import own_data, simulated_data
from fedsplit.owners.policy.refusals import tellable
from fedsplit.privacy.secret import OwnerSecret
from fedsplit.settings import read_settings
from fedsplit.tasks.multi_label import ClassSetColumn
from fedsplit.tasks.regression import NumberColumn

SECRET = OwnerSecret(bytes(range(32)))
SCORES = NumberColumn(0.0, 5.0)
TOPICS = ClassSetColumn(("art", "law", "sport"))


def lines(path: Path, cells: list[Any]) -> str:
    rows = [{"text": f"text {i}", "label": cell} for i, cell in enumerate(cells)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def table(path: Path, cells: list[str]) -> str:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([f"text {i}", cell] for i, cell in enumerate(cells))
    return str(path)


def config(task: str, **more: Any) -> RunConfig:
    return read_settings({"model.task": task, **more})


# ---- numbers -------------------------------------------------------------------------------


def test_numbers_are_read_by_value(tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", ["3", " 3.0 ", "3e0", "0", "5.0", "2.4"])
    data = load_dataset("file", path=path, column=SCORES)
    assert data.labels == (3.0, 3.0, 3.0, 0.0, 5.0, 2.4)
    assert data.label_names == ()
    assert all(type(label) is float for label in data.labels)
    assert load_dataset("file", path=lines(tmp_path / "b.jsonl", [1, 2.5]), column=SCORES).labels


@pytest.mark.parametrize(
    ("cell", "told"),
    [
        ("", "a.csv:3: label=None: must be a number; the cell is empty"),
        ("nan", "a.csv:3: label='nan': must be a number; the cell is empty"),
        ("inf", "a.csv:3: label='inf': must be a number$"),
        ("3,8", "a.csv:3: label='3,8': must be a number; a decimal comma is written as a point"),
        ("1_000", "a.csv:3: label='1_000': must be a number$"),
        ("good", "a.csv:3: label='good': must be a number$"),
        ("5.01", r"a.csv:3: label='5.01': must be in \[0, 5\], the agreed range"),
        ("-1", r"a.csv:3: label='-1': must be in \[0, 5\].*kept back"),
    ],
)
def test_what_is_no_number_of_the_range(tmp_path: Path, cell: str, told: str) -> None:
    path = table(tmp_path / "a.csv", ["1", cell, "2"])
    with pytest.raises(DataError, match=told):
        load_dataset("file", path=path, column=SCORES)


def test_a_boolean_and_a_list_are_no_numbers(tmp_path: Path) -> None:
    for cell in (True, [1.0], None):
        with pytest.raises(DataError, match=r"a.jsonl:2: label=.*: must be a number"):
            load_dataset("file", path=lines(tmp_path / "a.jsonl", [1.0, cell]), column=SCORES)


def test_a_split_whose_numbers_are_kept_back_is_not_tested_on(tmp_path: Path) -> None:
    table(tmp_path / "train.csv", ["1", "2", "3"])
    table(tmp_path / "test.csv", ["-1", "-1"])
    table(tmp_path / "dev.csv", ["4", "0"])
    _, held = load_splits("file", path=str(tmp_path), column=SCORES)
    assert held is not None
    assert held.labels == (4.0, 0.0)


def test_rows_are_held_out_and_divided_by_size_of_the_number(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [i % 5 + 0.5 for i in range(100)])
    data = load_dataset("file", path=path, column=SCORES)
    keep, out = train_test_split(range(100), data.strata(), 0.2, seed=0)
    assert sorted(data.labels[i] for i in out) == sorted([0.5, 1.5, 2.5, 3.5, 4.5] * 4)
    assert len(keep) == 80
    parts = partition(data, 3, "dirichlet", seed=0, alpha=0.3)
    assert sorted(i for part in parts for i in part.tolist()) == list(range(100))


def test_the_range_is_agreed_before_a_label_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FEDSPLIT_SIMULATION", raising=False)
    run = config("regression", **{"model.label-range": "0,5"})
    assert agreed_classes(run, {}) == agreed_classes(run, {"label-range": "0.0, 5"})
    nowhere: dict[str, object] = {"data-path": "/nowhere", "label-range": "1,5"}
    with pytest.raises(ConfigError, match="must be this owner's own label-range: 1,5"):
        own_data(run, nowhere, SECRET)
    node: dict[str, object] = {"data-path": lines(tmp_path / "a.jsonl", [0.5, 4.25, 7] * 4)}
    with pytest.raises(DataError, match=r"a.jsonl:3: label=7") as caught:
        own_data(run, node, SECRET, tmp_path)
    assert "7" not in str(tellable(caught.value))
    other = config("regression", **{"model.label-range": "0,7"})
    with pytest.raises(PolicyError, match="first that were announced"):  # 0,5 asked a question
        own_data(other, node, SECRET, tmp_path)
    train, test = own_data(other, node | {"label-range": "0,7"}, SECRET, tmp_path)
    assert {*train.labels, *test.labels} == {0.5, 4.25, 7.0}


# ---- sets of classes -----------------------------------------------------------------------


def test_sets_are_lists_or_separated_names(tmp_path: Path) -> None:
    cells = [
        ["law", "art"],
        [],
        "sport;art",
        "sport | law",
        '["art"]',
        "",
        None,
        "law;",
        ["art"] * 2,
    ]
    wanted = ((0, 1), (), (0, 2), (1, 2), (0,), (), (), (1,), (0,))
    data = load_dataset("file", path=lines(tmp_path / "a.jsonl", cells), column=TOPICS)
    assert data.labels == wanted
    assert data.label_names == TOPICS.agreed
    text = ["law;art", "", "sport;art", "sport|law", '["art"]', "", "", "law;", "art;art"]
    assert (
        load_dataset("file", path=table(tmp_path / "a.csv", text), column=TOPICS).labels == wanted
    )


def test_names_of_sets_are_compared_by_value(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [[1, "2.0"], "0; 2", [True]])
    assert load_dataset("file", path=path, column=ClassSetColumn((), 3)).labels == (
        (1, 2),
        (0, 2),
        (1,),
    )


@pytest.mark.parametrize("cell", [["art", "war"], "art;war", "war"])
def test_a_class_that_nobody_agreed_on_refuses_its_owner(tmp_path: Path, cell: Any) -> None:
    path = lines(tmp_path / "a.jsonl", [["art"], cell])
    data = load_dataset("file", path=path, column=TOPICS)
    with pytest.raises(DataError, match=r"a.jsonl:2: label='war': must be one of the agreed"):
        data.within(TOPICS.agreed)
    run = config(
        "multi-label",
        **{
            "model.labels": 3,
            "model.label-names": "art, law, sport",
            "data.kind": "file",
            "data.path": lines(tmp_path / "b.jsonl", [["art"], ["law"]] * 8 + [cell]),
            "data.owners": 2,
            "data.partition": "iid",
        },
    )
    fates = []
    for owner in range(2):
        try:
            simulated_data(run, owner)
        except DataError as error:
            fates.append(str(error))
    assert len(fates) == 1  # the other owner's rows are all right
    assert "b.jsonl:17" in fates[0]


def test_an_empty_name_in_a_list_is_no_class(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [["art", None]])
    with pytest.raises(DataError, match=r"a.jsonl:1: .*must be names of classes"):
        load_dataset("file", path=path, column=TOPICS)


def test_a_list_is_no_class_of_a_classifier(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", ["art", ["art", "law"]])
    with pytest.raises(DataError, match=r"a.jsonl:2: label=\['art', 'law'\]: must be a string"):
        load_dataset("file", path=path)


def test_a_column_that_is_empty_throughout_is_kept_back(tmp_path: Path) -> None:
    table(tmp_path / "train.csv", ["art", "", "law"])
    table(tmp_path / "test.csv", ["", ""])
    _, held = load_splits("file", path=str(tmp_path), column=TOPICS)
    assert held is None
