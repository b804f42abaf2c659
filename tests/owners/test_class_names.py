"""One class has one index at every owner, and a refusal tells the server no label."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedsplit.config import RunConfig
from fedsplit.data import names_digest
from fedsplit.errors import ConfigError, DataError, PolicyError
from fedsplit.owners.class_names import agreed_classes, keep_first
from fedsplit.owners.data_source import own_data, simulated_data
from fedsplit.owners.policy.refusals import tellable
from fedsplit.privacy.secret import OwnerSecret
from fedsplit.settings import read_settings

SECRET = OwnerSecret(bytes(range(32)))
NAMES = ("neg", "neutral", "pos")


def _config(names: str = "neg, neutral, pos", labels: int = 3, **more: Any) -> RunConfig:
    return read_settings({"model.label-names": names, "model.labels": labels, **more})


def _file(path: Path, labels: list[Any]) -> dict[str, object]:
    rows = [{"text": f"{label} {i}", "label": label} for i, label in enumerate(labels * 6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"data-path": str(path)}


def _pairs(config: RunConfig, node: dict[str, object], home: Path | None = None) -> set[Any]:
    parts = own_data(config, node, SECRET, home)
    return {
        (t.split()[0], y) for part in parts for t, y in zip(part.texts, part.labels, strict=True)
    }


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDSPLIT_SIMULATION", raising=False)


@pytest.mark.parametrize("own", ["", "neg,neutral,pos"])
@pytest.mark.parametrize("announced", ["", "neg, neutral, pos"])
def test_a_class_has_one_index_at_owners_with_other_classes(
    real: None, tmp_path: Path, own: str, announced: str
) -> None:
    config = _config(announced)
    nodes = [
        _file(tmp_path / "a.jsonl", list(NAMES)) | {"label-names": own},
        _file(tmp_path / "b.jsonl", ["neg", "pos"]) | {"label-names": own},
    ]
    if not (own or announced):  # nothing is agreed: names mean nothing to the others
        for node in nodes:
            with pytest.raises(DataError, match=r"jsonl:1: label='neg': must be one of.*0, 1, 2"):
                own_data(config, node, SECRET)
        return
    assert _pairs(config, nodes[0]) == {("neg", 0), ("neutral", 1), ("pos", 2)}
    assert _pairs(config, nodes[1]) == {("neg", 0), ("pos", 2)}


def test_integers_mean_themselves(real: None, tmp_path: Path) -> None:
    node = _file(tmp_path / "a.jsonl", [0, "2.0"])
    assert _pairs(_config(""), node) == {("0", 0), ("2.0", 2)}
    with pytest.raises(DataError, match=r"a.jsonl:2: label='2': must be one of.* 0, 1 "):
        own_data(_config("", 2), node, SECRET)


def test_an_unknown_label_is_refused_in_the_owners_coordinates(real: None, tmp_path: Path) -> None:
    node = _file(tmp_path / "a.jsonl", ["neg", "hiv+"])
    with pytest.raises(DataError, match=r"a.jsonl:2: label='hiv\+'") as caught:
        own_data(_config(), node, SECRET)
    assert "hiv" not in str(tellable(caught.value))
    assert "neg" not in str(tellable(caught.value))


def test_another_list_than_the_owners_own_is_refused_before_a_label_is_read(real: None) -> None:
    node: dict[str, object] = {"data-path": "/nowhere", "label-names": "neg,pos"}
    with pytest.raises(ConfigError, match="must be this owner's own label-names: neg, pos"):
        own_data(_config("pos, neg", 2), node, SECRET)
    with pytest.raises(ConfigError, match=r"model.labels=3: must be 2"):
        own_data(_config(""), node, SECRET)


def test_lists_that_a_server_makes_up_answer_no_question(real: None, tmp_path: Path) -> None:
    """Whether a second list is refused does not depend on the labels."""
    told = []
    for folder, label in (("with", "hiv+"), ("without", "flu")):
        home = tmp_path / folder
        home.mkdir()
        node = _file(home / "a.jsonl", [label, "flu"])
        with pytest.raises(DataError):  # the one answer that a server gets, once
            own_data(_config("x, y", 2), node, SECRET, home)
        for names in ("flu, hiv+", "flu, cold"):
            with pytest.raises(PolicyError, match="first that were announced") as caught:
                own_data(_config(names, 2), node, SECRET, home)
            told.append(str(tellable(caught.value)))
        assert _pairs(_config("flu, hiv+", 2), node | {"label-names": "flu,hiv+"}, home)
    assert len(set(told)) == 1


def test_the_first_list_is_kept_by_value_and_for_its_own_data(tmp_path: Path) -> None:
    node = {"data-path": "a"}
    keep_first(tmp_path, node, ("true", "false"))
    keep_first(tmp_path, node, ("1", "0"))
    keep_first(tmp_path, {"data-path": "b"}, ("x", "y"))
    with pytest.raises(PolicyError, match="must be true, false"):
        keep_first(tmp_path, node, ("0", "1"))


def test_without_labels_nothing_is_agreed() -> None:
    assert agreed_classes(_config("", **{"model.task": "causal-lm"}), {}) == ()
    assert agreed_classes(_config("", 2), {}) == ("0", "1")
    assert names_digest(("1", "0")) == names_digest(("true", "0.0")) != names_digest(("0", "1"))


@pytest.mark.parametrize("names", ["neg, pos", "neg, neg, pos", "a,b,c,d"])
def test_names_and_number_of_classes_agree(names: str) -> None:
    with pytest.raises(ConfigError, match=r"model.label-names"):
        _config(names)


def test_a_simulated_owner_with_an_unknown_label_is_refused_by_name(tmp_path: Path) -> None:
    for name, labels in (("a", list(NAMES)), ("b", ["neg", "pos"]), ("c", ["pos", "bad"])):
        _file(tmp_path / f"{name}.jsonl", labels)
    config = _config(
        **{
            "data.kind": "file",
            "data.path": str(tmp_path),
            "data.partition": "column",
            "data.column": "source",
            "data.owners": 3,
        }
    )
    found, refused = [], []
    for owner in range(3):
        try:
            parts = simulated_data(config, owner)
        except DataError as error:
            refused.append((owner, str(error)))
            continue
        found += [(t.split()[0], y) for p in parts for t, y in zip(p.texts, p.labels, strict=True)]
    assert set(found) == {("neg", 0), ("neutral", 1), ("pos", 2)}
    assert len(refused) == 1
    owner, message = refused[0]
    assert message.startswith(f"owner-{owner}: ")
    assert "c.jsonl:2: label='bad': must be one of the agreed classes neg, neutral, pos" in message
