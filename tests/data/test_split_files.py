"""What is trained on and what is tested on: no file of a test set is ever trained on unasked."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from fedsplit.data import load_dataset, load_splits
from fedsplit.errors import ConfigError, DataError
from fedsplit.owners.data_source import own_data, simulated_data
from fedsplit.privacy.secret import OwnerSecret
from fedsplit.settings import read_settings

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
SECRET = OwnerSecret(bytes(range(32)))


def _csv(path: Path, texts: str, labels: list[Any] | None = None) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text"] if labels is None else ["text", "label"])
        for i, text in enumerate(texts.split()):
            writer.writerow([text] if labels is None else [text, labels[i % len(labels)]])
    return path


@pytest.mark.parametrize(
    ("train", "test", "split"),
    [
        ("Train.csv", "Test.csv", "test"),
        ("TRAIN.CSV", "TEST.CSV", "test"),
        ("training.csv", "testing.csv", "test"),
        ("train.csv", "evaluation.csv", "eval"),
        ("Training.csv", "Validation.csv", "validation"),
        ("reviews_train.csv", "reviews_test.csv", "test"),
        ("sst2-train.v2.csv", "sst2-dev.v2.csv", "dev"),
    ],
)
def test_a_test_file_is_tested_on(tmp_path: Path, train: str, test: str, split: str) -> None:
    _csv(tmp_path / train, "a b c", [0, 1])
    _csv(tmp_path / test, "x y", [1, 0])
    for name in ("", split):
        learnt, held = load_splits("file", path=str(tmp_path), test_split=name)
        assert learnt.texts == ("a", "b", "c")
        assert held is not None
        assert held.texts == ("x", "y")


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["reviews_test.csv", "more.csv"], "which of them are for training cannot be told"),
        (["Train.csv", "training.csv"], "must be one file for 'train'"),
        (["test.csv", "train.csv", "Testing.csv"], "must be one file for 'test'"),
    ],
)
def test_what_cannot_be_told_is_not_guessed(tmp_path: Path, names: list[str], reason: str) -> None:
    for name in names:
        _csv(tmp_path / name, "a b", [0, 1])
    with pytest.raises(DataError, match=reason):
        load_splits("file", path=str(tmp_path))
    learnt, held = load_splits(
        "file", path=str(tmp_path / names[-1]), test_path=str(tmp_path / names[0])
    )
    assert held is not None  # the remedy that the message names
    assert learnt.texts == held.texts == ("a", "b")


def test_files_of_owners_are_no_splits(tmp_path: Path) -> None:
    for name in ("contest.csv", "bronte.csv", "latest-news.csv", "trains.csv"):
        _csv(tmp_path / name, name[0], [0])
    data = load_dataset("file", path=str(tmp_path))
    assert data.columns["source"] == ("bronte", "contest", "latest-news", "trains")


@pytest.mark.parametrize("test", ["hidden", "no column", "empty"])
def test_kept_back_labels_are_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, test: str
) -> None:
    _csv(tmp_path / "train.csv", "a b c", [0, 1])
    _csv(tmp_path / "dev.csv", "v", [1])
    labels = {"hidden": [-1], "no column": None, "empty": [""]}[test]
    _csv(tmp_path / "test.csv", "x y", labels)
    logger = logging.getLogger("fedsplit")
    logger.addHandler(caplog.handler)
    try:
        learnt, held = load_splits("file", path=str(tmp_path))
    finally:
        logger.removeHandler(caplog.handler)
    assert learnt.label_names == ("0", "1")  # -1 is no class
    assert learnt.labels == (0, 1, 0)
    assert held is not None
    assert (held.texts, held.labels) == (("v",), (1,))
    assert "split 'test' has no labels" in caplog.text
    with pytest.raises(DataError, match=r"test.csv"):
        load_splits("file", path=str(tmp_path), test_split="test")


def test_a_single_kept_back_label_is_named_with_its_remedies(tmp_path: Path) -> None:
    _csv(tmp_path / "train.csv", "a b", [0, 1])
    _csv(tmp_path / "test.csv", "x y", [1, -1])
    with pytest.raises(DataError, match=r"test.csv:3: label=-1.*|label='-1'.*data.test-path"):
        load_splits("file", path=str(tmp_path))
    _, held = load_splits("file", path=str(tmp_path), label_names=("-1", "0", "1"))
    assert held is not None
    assert held.labels == (2, 0)


def _settings(**data: Any) -> Any:
    flat = {f"data.{name.replace('_', '-')}": value for name, value in data.items()}
    return read_settings({"data.kind": "file", "data.partition": "iid", "model.labels": 2} | flat)


def test_settings_for_test_files_and_splits_in_a_simulation(tmp_path: Path) -> None:
    _csv(tmp_path / "train.csv", "a b c d", [0, 1])
    _csv(tmp_path / "dev.csv", "v w", [0])
    other = _csv(tmp_path / "extra", "x y", [0]).rename(tmp_path / "extra.data.csv")
    base = {"path": str(tmp_path / "train.csv"), "owners": 2}
    for settings, texts in (
        (base | {"test_path": str(other)}, {"x", "y"}),
        (base | {"path": str(tmp_path), "test_split": "dev"}, {"v", "w"}),
        (base | {"path": str(tmp_path), "train_split": "dev", "test_split": "train"}, set("abcd")),
    ):
        shares = [simulated_data(_settings(**settings), owner) for owner in range(2)]
        assert {t for _, test in shares for t in test.texts} == texts


def test_settings_for_test_files_and_splits_at_an_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FEDSPLIT_SIMULATION", raising=False)
    train = _csv(tmp_path / "mine.csv", "a b c", [0, 1])
    test = _csv(tmp_path / "quiz.csv", "x y", [0, 1])
    node = {"data-path": str(train), "test-path": str(test)}
    learnt, held = own_data(_settings(), node, SECRET)
    assert (learnt.texts, held.texts) == (("a", "b", "c"), ("x", "y"))
    with pytest.raises(ConfigError, match="node config header='no': must be of type bool"):
        own_data(_settings(), node | {"header": "no"}, SECRET)


# ---- delimited text -----------------------------------------------------------------------------


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_the_delimiter_is_the_one_that_gives_the_columns(
    tmp_path: Path, delimiter: str, suffix: str
) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_text(f'label{delimiter}text\n1{delimiter}"one, two; three"\n')
    data = load_dataset("file", path=str(path))
    assert (data.texts, data.labels) == (("one, two; three",), (0,))
    named = "tab" if delimiter == "\t" else delimiter
    assert load_dataset("file", path=str(path), delimiter=named).texts == data.texts


def test_owners_files_of_another_delimiter(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.csv").write_text(f"text;label\n{name} one;0\n{name} two;1\n")
    data = load_dataset("file", path=str(tmp_path), columns=("source",))
    assert data.texts == ("a one", "a two", "b one", "b two")
    assert data.columns["source"] == ("a", "a", "b", "b")


def test_a_file_without_a_header_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("A plane.,An air plane.,5.0\nA man.,A dog.,0\n")
    with pytest.raises(DataError, match=r"a.csv:1: column='text'.*header=false.*data.header"):
        load_dataset("file", path=str(path))
    data = load_dataset("file", path=str(path), header=False, text_column="1", label_column="3")
    assert data.texts == ("A plane.", "A man.")
    assert data.label_names == ("0", "5")
    with pytest.raises(DataError, match="column='4': is missing; found: 1, 2, 3"):
        load_dataset("file", path=str(path), header=False, text_column="1", label_column="4")


def test_several_text_columns_are_one_text_of_parts(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("q,a,label\nwho?,me,1\n")
    (tmp_path / "a.jsonl").write_text(json.dumps({"q": "who?", "a": "me", "label": 1}))
    for name in ("a.csv", "a.jsonl"):
        data = load_dataset("file", path=str(tmp_path / name), text_column="q, a")
        assert data.texts == ("who?\x1fme",)
    (tmp_path / "b.csv").write_text("q,a,label\nwho?,m\x1fe,1\n")
    with pytest.raises(DataError, match=r"b.csv:2: text=.*must be a text without U"):
        load_dataset("file", path=str(tmp_path / "b.csv"), text_column="q,a")


def test_a_file_that_never_quotes(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('text\tlabel\n"so he said\t0\nand "she\t1\n')
    with pytest.raises(DataError, match="quotes=false"):
        load_dataset("file", path=str(path))
    assert load_dataset("file", path=str(path), quotes=False).texts == ('"so he said', 'and "she')


@pytest.mark.skipif(not (SHARED / "stsb").is_dir(), reason="shared/data/stsb is not here")
def test_sts_b_as_it_is_published() -> None:
    data = load_dataset(
        "file", path=str(SHARED / "stsb"), text_column="1,2", label_column="", header=False
    )
    assert data.texts[0] == "A plane is taking off.\x1fAn air plane is taking off."
    assert len(data) == 5749
