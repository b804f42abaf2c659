"""A Flower user's own ServerApp around the strategies: short, with keywords, wrappers composing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    Krum,
    Result,
)
from safetensors.torch import load_file

from fedsplit.config import PrivacyConfig, RunConfig
from fedsplit.errors import ConfigError
from strategies import OffsiteTuning, SplitTuning
from strategies.settings import run_config
from tests.strategies.local_grid import LocalGrid

Main = Callable[[Grid, Context], Result]


def run_app(main: Main, config: RunConfig) -> Result:
    """Call a ServerApp's main as Flower does."""
    torch.manual_seed(0)
    grid = LocalGrid(config, config.data.owners)
    flat = dict(config.to_flat())
    context = Context(7, node_id=0, node_config={}, state=RecordDict(), run_config=flat)
    return main(grid, context)


def server(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "server.json").read_text())
    return found


def test_split_tuning(make_config: Any, tmp_path: Path) -> None:
    def main(grid: Grid, context: Context) -> Result:
        with SplitTuning.open(context, rounds=1, output_dir=tmp_path / "own") as strategy:
            return strategy.start(grid)

    result = run_app(main, make_config())
    assert result.train_metrics_clientapp[1]["lineage-ok"] == 1
    told = server(tmp_path / "own")
    assert told["status"] == "completed"
    assert told["rounds"][0]["train"]["finished"] == ["owner-0", "owner-1", "owner-2"]
    assert load_file(tmp_path / "own" / "top.safetensors")


def test_offsite_tuning(offsite: Any, tmp_path: Path) -> None:
    def main(grid: Grid, context: Context) -> Result:
        with OffsiteTuning.open(context, rounds=1, averaging=FedAdam(eta=0.01)) as strategy:
            return strategy.start(grid)

    config = offsite()
    result = run_app(main, config)
    folder = Path(config.output.dir)
    assert server(folder)["status"] == "completed"
    assert "plug-in-loss" in result.train_metrics_clientapp[1]
    assert (folder / "model" / "config.json").is_file()


@pytest.mark.parametrize("averaging", [FedAdam, Krum, None])
def test_what_owners_train_is_averaged_as_the_user_says(make_config: Any, averaging: Any) -> None:
    made = averaging() if averaging else None
    if made is None:
        made = DifferentialPrivacyServerSideFixedClipping(FedAvg(), 0.1, 1.0, 3)

    def main(grid: Grid, context: Context) -> Result:
        with SplitTuning.open(context, rounds=1, averaging=made) as strategy:
            return strategy.start(grid)

    config = make_config(split__bottom="joint", split__k=1, train__bottom_lr=1e-2)
    plain = run_app(lambda grid, context: started(context, grid), config)
    own = run_app(main, config)
    assert own.arrays.keys() == plain.arrays.keys()
    assert any((own.arrays[n].numpy() != a.numpy()).any() for n, a in plain.arrays.items())


def started(context: Context, grid: Grid) -> Result:
    with SplitTuning.open(context, rounds=1) as strategy:
        return strategy.start(grid)


def test_a_wrapper_may_stand_around_the_strategy(make_config: Any) -> None:
    def main(grid: Grid, context: Context) -> Result:
        with SplitTuning.open(context) as strategy:
            private = DifferentialPrivacyServerSideFixedClipping(strategy, 0.1, 1.0, 3)
            return private.start(grid, strategy.initial_arrays, num_rounds=1)

    result = run_app(main, make_config(split__bottom="joint", split__k=1))
    assert result.arrays


def test_a_failure_is_written_down(make_config: Any) -> None:
    def main(grid: Grid, context: Context) -> Result:
        with SplitTuning.open(context):
            raise ValueError("the user's own")

    config = make_config()
    with pytest.raises(ValueError, match="the user's own"):
        run_app(main, config)
    told = server(Path(config.output.dir))
    assert (told["status"], told["error"]) == ("failed", "ValueError: the user's own")


def test_settings_are_keywords() -> None:
    config = run_config(
        {"train.rounds": 9, "seed": 3},
        "split-tuning",
        model="gpt2",
        labels=5,
        k=2,
        lr=0.5,
        train_clip=2.0,
        privacy=PrivacyConfig(mechanism="dchi", eta=40.0),
        session={"reconnect_s": 1.0},
    )
    assert (config.model.name, config.model.labels, config.split.k) == ("gpt2", 5, 2)
    assert (config.train.rounds, config.train.lr, config.train.clip) == (9, 0.5, 2.0)
    assert (config.seed, config.privacy.eta, config.session.reconnect_s) == (3, 40.0, 1.0)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"clip": 1.0}, "must be train_clip or privacy_clip or dp_clip"),
        ({"kk": 1}, "unknown setting"),
        ({"privacy": {"etta": 1.0}}, "unknown setting"),
        ({"k": "two"}, "must be of type int"),
    ],
)
def test_settings_that_cannot_be_meant(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        run_config(**settings)
