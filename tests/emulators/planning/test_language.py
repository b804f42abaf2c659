"""The planner's answer for language models: valid settings, honest verdicts, plausible costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedsplit.cli import app_cli
from fedsplit.emulators.planning.language import WAYS, answers, measured
from fedsplit.emulators.planning.planner import Base, describe_base
from fedsplit.errors import ConfigError
from fedsplit.settings import read_settings
from tests.tiny_models import save_tiny_llama

WIDE = {"COLUMNS": "300", "NO_COLOR": "1"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def base(llama: Path) -> Base:
    return describe_base(str(llama))


def row(protection: str, joint: float, gain: float, level: float = 2) -> dict[str, Any]:
    return {
        "data": "d",
        "protection": protection,
        "level": level,
        "runs": 1,
        "gain_share": gain,
        "token_recovery": 0.1,
        "guess": 0.1,
        "joint_recovery": joint,
    }


def test_measured_rows_are_shares_of_known_protections() -> None:
    assert measured()
    for found in measured():
        assert found["protection"] in WAYS
        for column in ("token_recovery", "guess", "text_recovery", "joint_recovery"):
            assert 0 <= found[column] <= 1, found
        assert found["gain_share"] <= 2
        assert found["runs"] >= 1


@pytest.mark.parametrize("protection", list(WAYS))
def test_advised_settings_are_a_run(protection: str) -> None:
    flat: dict[str, Any] = {"model.task": "causal-lm"}
    for pair in WAYS[protection].settings.format(level=2.0).split():
        key, _, value = pair.partition("=")
        flat[key] = type(read_settings({}).to_flat()[key])(value)
    assert read_settings(flat).to_flat().items() >= flat.items()


def test_what_meets_the_floor_comes_first_and_the_best_of_it_leads(base: Base) -> None:
    rows = [row("none", 1.0, 1.0), row("offsite", 0.2, 0.7), row("noisy-tail", 0.3, 0.4)]
    found = answers(base, 0.6, rows)
    assert [(a.protection, a.meets) for a in found] == [
        ("offsite", True),
        ("noisy-tail", True),
        ("none", False),
    ]
    assert [a.meets for a in answers(base, 0.75, rows)] == [True, False, False]
    with pytest.raises(ConfigError, match=r"floor=1\.5: must be in \[0, 1\]"):
        answers(base, 1.5, rows)


def test_costs_follow_from_what_crosses(base: Base) -> None:
    names = ("none", "client-tail", "own-tail", "offsite")
    made = {n: WAYS[n].costs(base, 1) for n in names}
    hidden = base.sizes.hidden
    assert made["none"].up == 2 * hidden == 2 * made["own-tail"].up
    assert (made["offsite"].up, made["offsite"].down) == (0, 0)
    assert made["own-tail"].round == made["none"].round == 0
    assert made["client-tail"].round == base.sizes.block + base.vocab * hidden
    assert WAYS["own-tail"].costs(base, 2).flops > made["own-tail"].flops > made["none"].flops


@pytest.mark.parametrize("floor", [0.0, 1.0])
def test_the_command_says_which_meets_and_that_none_does(
    llama: Path, tmp_path: Path, floor: float
) -> None:
    out = tmp_path / "plan.json"
    asked = ["plan", str(llama), "--task", "causal-lm", "--floor", str(floor), "--json", str(out)]
    done = CliRunner().invoke(app_cli, asked, env=WIDE)
    assert done.exit_code == 0, done.output
    if floor:
        assert "split tuning: no measured setting meets the floor" in done.output
    else:
        assert "split tuning: labels.protection=" in done.output
    rows = json.loads(out.read_text())
    assert len(rows) == len(measured())
    assert all(r["meets"] == (floor == 0) for r in rows)


def test_another_task_is_refused(llama: Path) -> None:
    done = CliRunner().invoke(app_cli, ["plan", str(llama), "--task", "other"], env=WIDE)
    assert done.exit_code != 0
    assert "causal-lm" in done.output + str(done.exception)
