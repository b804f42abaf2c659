"""The kind ``instruct`` on a tiny random LLaMA: every way is judged on the same conversations."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedsplit.errors import ConfigError
from simulations.core.kinds import KINDS
from simulations.core.run_folder import RunFolder, read_results
from simulations.core.settings import load_experiment
from simulations.split import instruct
from simulations.split.instruct import OPTIONS, plain_words
from tests.tiny_models import save_tiny_llama


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("instruct")
    draw = random.Random(0)
    rows = [
        {"prompt": f"w{draw.randrange(60)} w{draw.randrange(60)}", "completion": "w70 w71 w72"}
        for _ in range(60)
    ]
    path = folder / "asked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"model": str(save_tiny_llama(folder / "base", layers=4)), "data.path": str(path)}


def carry_out(material: dict[str, Any], folder: Path, *more: str, force: bool = False) -> Any:
    small = (
        *(f"{key}={value}" for key, value in material.items()),
        "data.limit=0",
        "data.owners=2",
        "model.max-tokens=12",
        "offsite.block=12",
        "offsite.scores=",
        "offsite.positions=0,3",
        "offsite.alpha=0.0",
        "offsite.rank=4",
        "train.rounds=2",
        "train.lr=3e-2",
        "options.prompts=6",
        "options.new-tokens=4",
    )
    experiment = load_experiment("instruct", [*small, *more])
    with RunFolder(folder, name="x", kind=experiment.result_kind, force=force) as run_folder:
        KINDS[experiment.kind](experiment, run_folder, Console(quiet=True))
    return read_results(folder)["rows"]


def test_every_way_learns_the_answers_and_none_is_run_twice(
    material: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = carry_out(material, tmp_path / "run")
    assert {row["data"] for row in rows} == {"asked"}
    found = {(row["way"], row["metric"]): row["value"] for row in rows}
    assert {way for way, _ in found} == set(OPTIONS["ways"])
    before = found["zero-shot", "answer_loss"]
    for way in OPTIONS["ways"][1:]:
        assert found[way, "answer_loss"] < before - 0.2, way
    assert all(0.0 <= found[way, "exact_match"] <= 1.0 for way in OPTIONS["ways"])
    # Split tuning takes the steps of one process.
    apart = abs(found["split", "answer_loss"] - found["centralised", "answer_loss"])
    assert apart < 0.05 * before

    def never(*_: Any) -> None:
        raise AssertionError("run again")

    monkeypatch.setattr(instruct.InstructSetting, "cell", never)
    assert carry_out(material, tmp_path / "run", force=True) == rows


def test_questions_are_answered_by_the_likeliest_choice(
    material: dict[str, Any], tmp_path: Path
) -> None:
    draw = random.Random(1)
    rows = []
    for _ in range(60):
        # The right choice is always the same word, the wrong ones are others: it can be learned.
        wrong = [f"w{draw.randrange(60)}" for _ in range(3)]
        place = draw.randrange(4)
        rows.append(
            {
                "question": f"w{draw.randrange(60)} w{draw.randrange(60)}",
                "choices": [*wrong[:place], "w70", *wrong[place:]],
                "answer": place,
            }
        )
    path = tmp_path / "chosen.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ways = 'options.ways=["zero-shot","centralised"]'
    rows = carry_out({**material, "data.path": str(path)}, tmp_path / "run", ways)
    found = {(row["way"], row["metric"]): row["value"] for row in rows}
    assert found["zero-shot", "choice_accuracy"] < 0.7
    assert found["centralised", "choice_accuracy"] > 0.9
    assert found["centralised", "choice_accuracy_norm"] > 0.9


def test_words_are_compared_without_case_marks_and_articles() -> None:
    assert plain_words("The  Eiffel Tower.") == plain_words("eiffel tower")
    assert plain_words("Paris") != plain_words("Paris, France")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ('options.ways=["guess"]', "guess"),
        ("options.prompts=0", r"options\.prompts=0: must be >= 1"),
    ],
)
def test_bad_options_are_refused(
    material: dict[str, Any], tmp_path: Path, change: str, told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        carry_out(material, tmp_path / "run", change)
