"""Owners' own data, secrets, and settings that cannot work."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedsplit.config import RunConfig
from fedsplit.errors import (
    ConfigError,
    ModelError,
    RunError,
    UnsupportedModelError,
)
from strategies.split_tuning.strategy import SplitTuning
from tests.strategies.failing import QUICK, VICTIM, assert_only_the_victim_is_lost, hurry, warm
from tests.strategies.local_grid import LocalGrid

__all__ = ["warm"]  # a fixture that runs by itself


@pytest.fixture
def own_files(
    make_config: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, texts: Path
) -> Callable[..., tuple[RunConfig, Callable[[LocalGrid, SplitTuning], None]]]:
    """Return a function: owner-1's rows -> settings and grid of three owners with own files."""
    rows = [json.loads(line) for line in texts.read_text().splitlines()]

    def build(bad: list[dict[str, Any]] | None, **node: Any) -> Any:
        config = make_config(**QUICK)
        monkeypatch.delenv("FEDSPLIT_SIMULATION")
        parts = [rows[:30], rows[30:60] if bad is None else bad, rows[60:90]]

        def prepare(grid: LocalGrid, strategy: SplitTuning) -> None:
            for owner, part in enumerate(parts):
                path = tmp_path / f"own-{owner}.jsonl"
                path.write_text("".join(json.dumps(row) + "\n" for row in part))
                grid.node_configs[owner] = {
                    "data-path": str(path),
                    "state-dir": str(tmp_path / f"home-{owner}"),
                }
            grid.node_configs[VICTIM] |= node

        return config, prepare

    return build


def _texts(n: int) -> list[dict[str, Any]]:
    return [{"text": f"w{i} w{i + 1} w{i + 2}", "label": i % 3} for i in range(n)]


BAD_DATA: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "a label outside the range": ([*_texts(30), {"text": "w1", "label": 3}], {}, "label='3'"),
    "a missing column": ([{"words": "w1 w2", "label": 0}] * 30, {}, "text"),
    "another column's name": (_texts(30), {"label-column": "class"}, "class"),
    "no rows": ([], {}, "own-1.jsonl"),
    "one row": (_texts(1), {}, "1 different texts: must be >= 2"),
    "no file": (_texts(30), {"data-path": "/nowhere/texts.jsonl"}, "/nowhere/texts.jsonl"),
    "no data named": (_texts(30), {"data-path": ""}, "data-path: must name this owner's own"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_at_one_owner(
    own_files: Any, run_locally: Any, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    rows, node, reason = BAD_DATA[case]
    config, prepare = own_files(rows, **node)
    # The first run in a process takes fedsplit's loggers away from the root, where caplog listens.
    logger = logging.getLogger("fedsplit")
    logger.addHandler(caplog.handler)
    try:
        run = run_locally(config, prepare=prepare)
    finally:
        logger.removeHandler(caplog.handler)
    # What is wrong with the data stands in the owner's log; the server learns that it was the data.
    told = (
        "ConfigError: a setting" if "data-path: must" in reason else "DataError: this owner's data"
    )
    assert_only_the_victim_is_lost(run, told)
    assert any(reason in record.getMessage() for record in caplog.records)


def test_an_unknown_class_refuses_its_owner_alone(own_files: Any, run_locally: Any) -> None:
    rows = [*_texts(30), {"text": "w1", "label": "hiv+"}]
    config, prepare = own_files(rows)
    config = replace(config, model=replace(config.model, label_names="0, 1, 2"))
    run = run_locally(config, prepare=prepare)
    assert_only_the_victim_is_lost(run, "DataError: this owner's data")
    assert "hiv" not in json.dumps(run.server)


def test_good_files_of_their_own(own_files: Any, run_locally: Any) -> None:
    config, prepare = own_files(None)
    train = run_locally(config, prepare=prepare).server["rounds"][0]["train"]
    assert train["lost"] == {}
    assert len(train["finished"]) == 3


def test_a_secret_that_others_can_read(
    own_files: Any, run_locally: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hurry(monkeypatch, {1: {2}})
    (tmp_path / "home-1").mkdir()
    secret = tmp_path / "home-1" / "noise.secret"
    secret.write_bytes(bytes(32))
    secret.chmod(0o640)
    config, prepare = own_files(None)
    run = run_locally(config, prepare=prepare)
    assert_only_the_victim_is_lost(run, "PrivacyError: a privacy mechanism", name="node 1034")


# ---- settings -----------------------------------------------------------------------------------


def test_an_empty_partition_ends_the_run_with_its_reason(
    make_config: Any, run_locally: Any
) -> None:
    config = make_config(data__partition="column", data__column="writer", **QUICK)
    with pytest.raises(RunError, match="no owner took a step") as caught:
        run_locally(make_config(**QUICK | {"data__limit": 5}))
    assert "every owner must have 2" in str(caught.value)
    assert run_locally(config).server["rounds"][0]["train"]["lost"] == {}


def test_wrong_settings_end_the_run_before_it_begins(
    make_config: Any, run_locally: Any, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"k=3: must be in 0..2"):
        run_locally(make_config(split__k=3))
    for name, value in (("eta", -1.0), ("eta", 0.0), ("noise_ratio", -2.0)):
        with pytest.raises(ConfigError, match=f"privacy.*{value}"):
            make_config(privacy__mechanism="dchi", **{f"privacy__{name}": value})
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    (unknown / "config.json").write_text(json.dumps({"model_type": "perceptron-1958"}))
    with pytest.raises((ModelError, UnsupportedModelError), match="perceptron-1958"):
        run_locally(make_config(model__name=str(unknown)))
    with pytest.raises(ConfigError, match="mechanism='rot13': must be one of"):
        run_locally(make_config(privacy__mechanism="rot13"))
