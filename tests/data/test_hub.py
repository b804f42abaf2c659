"""The Hub, without a network: local folders, and what is said when it cannot be reached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedsplit.data import load_dataset, load_splits
from fedsplit.errors import DataError

datasets = pytest.importorskip("datasets")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.csv").write_text("sentence,topic\nx,b\ny,a\nz,b\n")
    (data / "test.csv").write_text("sentence,topic\nw,b\n")
    return data


def test_local_folder(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train, test = load_splits("hub", path=str(folder), text_column="sentence", label_column="topic")
    assert test is not None
    assert (train.texts, train.labels) == (("x", "y", "z"), (1, 0, 1))
    assert (test.labels, test.label_names) == ((1,), ("a", "b"))
    with pytest.raises(DataError, match="column='label': is missing; found: sentence, topic"):
        load_dataset("hub", path=str(folder), text_column="sentence")
    with pytest.raises(DataError, match="split='dev': must be one of train, test"):
        load_dataset("hub", path=str(folder), split="dev")
    assert capfd.readouterr().err == ""
    assert not datasets.are_progress_bars_disabled()


@pytest.mark.parametrize("path", ["", "csv", "imdb", "../up/data", "a/b/c", "x/y:z w", "x/y@"])
def test_names_that_could_be_something_else(path: str) -> None:
    with pytest.raises(DataError, match="must be owner/name"):
        load_dataset("hub", path=path)


def test_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "get_dataset_split_names", unreachable)
    with pytest.raises(DataError, match=r"no/where: cannot be loaded \(ConnectionError.*network"):
        load_dataset("hub", path="no/where")


def test_versions_that_run_repositories_code_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "__version__", "3.6.0")
    with pytest.raises(DataError, match=r"datasets=3.6.0: must be >= 4"):
        load_dataset("hub", path="no/where")


def test_name_revision_config_and_class_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str | None, ...]] = []
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )

    def fake_names(path: str, config_name: str | None, revision: str | None) -> list[str]:
        asked.append((path, revision, config_name))
        return ["train", "test"]

    def fake_load(path: str, name: str | None, revision: str | None, split: str) -> Any:
        asked.append((path, revision, name, split))
        labels = [1, -1] if split == "test" else [1, 0]
        return datasets.Dataset.from_dict({"text": ["x", "y"], "label": labels}, features=features)

    monkeypatch.setattr(datasets, "get_dataset_split_names", fake_names)
    monkeypatch.setattr(datasets, "load_dataset", fake_load)
    dataset = load_dataset("hub", path="nyu-mll/glue@0123abc:sst2")
    where = ("nyu-mll/glue", "0123abc", "sst2")
    assert asked == [where, (*where, "train")]
    assert (dataset.label_names, dataset.labels) == (("neg", "pos"), (1, 0))
    with pytest.raises(DataError, match=r"row 1: label=-1: .*data.test-split"):
        load_splits("hub", path="nyu-mll/glue")
    # The parties' order outranks the repository's: what agrees is the class's name.
    agreed = load_dataset("hub", path="nyu-mll/glue", label_names=("pos", "neutral", "neg"))
    assert (agreed.label_names, agreed.labels) == (("pos", "neutral", "neg"), (0, 2))
