"""The page shows a task's scores beside the twin's, and which class was taken for which."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsplit import confusion
from fedsplit.config import RunConfig
from simulations.core.run_folder import RunFolder
from simulations.report.facts import read_facts
from simulations.report.page import write_report
from simulations.report.score_tables import class_rows, score_rows
from simulations.report.words import extent, what_the_server_reads
from simulations.split.results_table import table_rows
from strategies.rounds.replies import average
from tests.simulations.report.runs import HOSTILE, split_results

CLASSES = {
    "metric": "accuracy",
    "federated": 0.75,
    "centralised": 0.8,
    "baseline": 0.5,
    "macro-f1": 0.7333,
    "micro-f1": 0.75,
    "mcc": 0.5774,
    "recalls": [0.5, 1.0],
    "confusion": [[1, 1], [0, 2]],
    "samples": 4,
    "baseline_is": "majority class",
    "centralised_scores": {"accuracy": 0.8, "macro-f1": 0.81, "loss": 0.4},
}
NUMBERS = {
    "metric": "spearman",
    "federated": 0.8512,
    "centralised": 0.8525,
    "baseline": 0.1,
    "spearman": 0.8512,
    "spearman-error": 0.004,
    "pearson": 0.8601,
    "rmse": 0.91,
    "samples": 4,
    "baseline_is": "zero-shot",
    "centralised_scores": {"pearson": 0.8605},
}
SETS = {
    "metric": "micro-f1",
    "federated": 0.61,
    "centralised": 0.62,
    "baseline": 0.2,
    "micro-f1": 0.61,
    "macro-f1": 0.55,
    "recalls": [0.5, 0.7],
    "precisions": [0.5, 0.6],
    "samples": 4,
    "baseline_is": "zero-shot",
    "centralised_scores": {"macro-f1": 0.56},
}


def folder_of(path: Path, utility: dict[str, Any], classes: list[str]) -> RunFolder:
    with RunFolder(path, name="x", kind="split") as folder:
        folder.write_config({"seed": 3})
        results = split_results()
        results["traffic"]["bottom_bytes"] = 1e6
        folder.record(**{**results, "utility": utility, "classes": classes})
    return folder


@pytest.mark.parametrize(
    ("utility", "told"),
    [
        (CLASSES, {"macro-f1": ("73.3 %", "81.0 %"), "mcc": ("0.577", "")}),
        (NUMBERS, {"spearman": ("0.851", "0.853"), "pearson": ("0.860", "0.861")}),
        (SETS, {"micro-f1": ("61.0 %", "62.0 %"), "macro-f1": ("55.0 %", "56.0 %")}),
    ],
)
def test_scores_stand_beside_the_twins(
    tmp_path: Path, utility: dict[str, Any], told: dict[str, tuple[str, str]]
) -> None:
    rows = {name: (here, there) for name, here, there in score_rows(utility)}
    assert told.items() <= rows.items()
    assert not {"samples", "baseline", "centralised"} & rows.keys()

    folder = folder_of(tmp_path, utility, ["no", "yes"])
    page = write_report(folder.path).read_text()
    for pair in told.values():
        for text in filter(None, pair):
            assert f">{text}</td>" in page
    cells = [cell for row in table_rows(folder.results) for cell in row]
    assert any(told[name][0] in cell for name in told for cell in cells)


def test_names_of_classes_are_text_in_the_table(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, CLASSES, ["no", HOSTILE])
    page = write_report(folder.path).read_text()
    assert "<script>" not in page
    assert page.count("which class was taken for which") == 1
    other = folder_of(tmp_path / "b", {**CLASSES, "confusion": [[1] * 40] * 40}, ["no", "yes"])
    assert "which class was taken" not in write_report(other.path).read_text()
    assert read_facts(other.path).get("utility")["confusion"]


def test_scores_of_some_owners_say_whose_they_are(tmp_path: Path) -> None:
    """Counts that a policy keeps back are missing from macro-F1, and the page says so."""
    counts = confusion.to_report(np.array([[3, 1], [2, 4]]))
    each: dict[str, dict[str, float]] = {
        "a": {"num-examples": 10, "targets": 10, "loss": 1.0, "accuracy": 0.7, **counts},
        "b": {"num-examples": 30, "targets": 30, "loss": 2.0, "accuracy": 0.5},
        "c": {"num-examples": 20, "targets": 20, "loss": 3.0},
    }
    found = average(each, scores=lambda sums: confusion.scores(confusion.of_reports([sums])))
    assert found["covered"] == {
        "loss": {"owners": 3, "texts": 60},
        "accuracy": {"owners": 2, "texts": 40},
        "scores": {"owners": 1, "texts": 10},
    }
    utility = {**CLASSES, "samples": 60, "reporting": 3, "covered": found["covered"]}
    assert extent(utility) == "1 of 3 owners (10 of 60 texts)"
    assert extent(utility, "loss") == ""
    folder = folder_of(tmp_path, utility, ["no", "yes"])
    page = write_report(folder.path).read_text()
    assert "Held-out accuracy is 75.0 % on the texts of 2 of 3 owners (40 of 60 texts)" in page
    assert "are of 1 of 3 owners (10 of 60 texts): the policies of the others keep" in page
    assert "held-out texts of all owners" not in page
    told = {name: why for name, _, why in table_rows(folder.results)}
    assert "1 of 3 owners (10 of 60 texts)" in told["macro-F1, Matthews' correlation"]
    whole = folder_of(tmp_path / "whole", CLASSES, ["no", "yes"])
    assert "held-out texts of all owners" in write_report(whole.path).read_text()


def test_types_of_entities_have_scores_of_their_own(tmp_path: Path) -> None:
    utility = {"metric": "entity-f1", "federated": 0.4, "samples": 4, "baseline_is": "zero-shot"}
    utility |= {"baseline": 0.1, "centralised": 0.5, "entity-f1": 0.4, "entity-precision": 0.25}
    utility["entity-f1-by-type"] = [0.125, 0.5]
    tags = ["O", "B-person", "I-person", HOSTILE, "B-place"]
    folder = folder_of(tmp_path, utility, [tag for tag in tags if tag != HOSTILE])
    assert class_rows(read_facts(folder.path)) == (
        ["F1"],
        [("person", ["12.5 %"]), ("place", ["50.0 %"])],
    )
    page = write_report(folder.path).read_text()
    assert "type of entity" in page
    assert "Held-out entity F1 is 40.0 %" in page
    assert "10.0 % before any training" in page
    assert "25.0 %" in page  # a precision is a share, as a recall is
    other = folder_of(tmp_path / "b", utility, tags)  # names that are none of tags: by number
    assert [name for name, _ in class_rows(read_facts(other.path))[1]] == ["0", "1"]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"privacy.mechanism": "none", "labels.protection": "none"}, ["vectors", "gradient"]),
        ({"privacy.mechanism": "none", "labels.protection": "row-noise"}, ["vectors"]),
        ({"privacy.mechanism": "dchi", "labels.protection": "client-head+none"}, ["gradient"]),
        ({"privacy.mechanism": "dchi", "labels.protection": "client-tail"}, []),
        ({"privacy.mechanism": "dchi", "model.task": "causal-lm"}, []),
    ],
)
def test_what_the_model_owner_can_read_is_told(
    tmp_path: Path, settings: dict[str, Any], told: list[str]
) -> None:
    with RunFolder(tmp_path, name="x", kind="split") as folder:
        folder.write_config(RunConfig.from_flat(settings).to_flat())
        folder.record(**split_results())
    found = what_the_server_reads(read_facts(tmp_path))
    assert len(found) == len(told)
    assert all(word in sentence for word, sentence in zip(told, found, strict=True))
    assert all(sentence in html.unescape(write_report(tmp_path).read_text()) for sentence in found)
