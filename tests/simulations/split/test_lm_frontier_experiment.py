"""The experiment on protections of language models: laws that its rows keep on a tiny model."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fedsplit.errors import ConfigError
from fedsplit.privacy.secret import OwnerSecret
from simulations.core.run_folder import RunFolder
from simulations.core.settings import Experiment, load_experiment
from simulations.split.lm_frontier import PROTECTIONS, run, with_shares
from simulations.split.lm_private_schemes import channel_of, draw_targets
from tests.tiny_models import save_texts, save_tiny_llama

SECRET = OwnerSecret.for_simulation(0, "targets")

OWN: dict[str, Any] = {"seeds": 1, "tokens": 480, "held-out": 200, "lr": 3e-3, "lr-tail": 3e-3}


def settings_of(model: Path) -> dict[str, Any]:
    return {
        "model.name": str(model),
        "model.task": "causal-lm",
        "model.max-tokens": 24,
        "model.dropout": 0.0,
        "train.method": "lora",
        "data.kind": "file",
        "data.owners": 3,
        "data.partition": "iid",
        "lineage.gate": "off",
    }


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, float], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("frontier")
    model = save_tiny_llama(folder / "model")
    texts = save_texts(folder / "texts.jsonl", 90)
    wanted = [
        "none:0",
        "none+head:0",
        "client-tail:1",
        "own-tail:1",
        "row-noise:1e6",
        "raw-row-noise:1e-3",
        "drawn-targets:0.9999",
        "drawn-targets:0",
        "dp-tail:1e-3",
    ]
    options = OWN | {
        "data": [f"texts={texts}"],
        "settings": [f"{name}:60" for name in wanted],
    }
    experiment = Experiment("lm", "lm-frontier", "a test", settings_of(model), options)
    out = RunFolder(folder / "out", name="lm", kind="table")
    with out:
        run(experiment, out, Console(file=io.StringIO()))
    found = json.loads((folder / "out" / "results.json").read_text())["rows"]
    assert len(found) == len(wanted)
    return {(row["protection"], row["level"]): row for row in found}


def test_without_protection_every_token_and_text_is_read(rows: Any) -> None:
    plain = rows["none", 0]
    assert (plain["token_recovery"], plain["text_recovery"]) == (1.0, 1.0)
    assert rows["none+head", 0]["token_recovery"] == 1.0
    assert plain["gain_share"] == 1.0
    assert plain["gain"] > 0


def test_noise_without_end_hides_all_and_teaches_little(rows: Any) -> None:
    drowned, clear = rows["row-noise", 1e6], rows["raw-row-noise", 1e-3]
    assert drowned["token_recovery"] == drowned["guess"]
    # AdamW takes full steps along whatever little a drowned gradient still says.
    assert drowned["gain_share"] < 0.5 * clear["gain_share"]
    assert clear["token_recovery"] == 1.0
    assert clear["gain_share"] > 0.3


def test_a_tail_of_ones_own_tells_what_the_base_tells(rows: Any) -> None:
    own, averaged = rows["own-tail", 1], rows["client-tail", 1]
    assert own["token_recovery"] < 0.2
    assert min(own["gain"], averaged["gain"]) > 0
    assert own["joint_recovery"] == averaged["joint_recovery"] == 1.0, "rows are in the clear"


def test_targets_that_stay_teach_as_exact_ones_and_are_read(rows: Any) -> None:
    kept, drowned = rows["drawn-targets", 0.9999], rows["drawn-targets", 0]
    assert kept["token_recovery"] > 0.99
    assert kept["gain_share"] == pytest.approx(1.0, abs=0.15)
    assert drowned["token_recovery"] == pytest.approx(drowned["guess"], abs=0.02)
    assert drowned["gain"] < 0.2 * kept["gain"]


def test_a_channel_of_targets_is_metric_private() -> None:
    matrix = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    law, distance = channel_of(matrix, 0.3), torch.cdist(matrix, matrix)
    assert torch.allclose(law.sum(1), torch.ones(40))
    assert float(law.diagonal().mean()) == pytest.approx(0.3, abs=1e-3)
    ratio = (law[:, None] / law[None]).log().abs().amax(2)  # (y, y')
    beta = float((law[0, 0] / law[0, 1]).log() / distance[0, 1])
    assert bool((ratio <= 2 * beta * distance + 1e-3).all())
    drawn = draw_targets(law, torch.full((20_000,), 7), SECRET, 0)
    shares = torch.bincount(drawn, minlength=40) / 20_000
    assert torch.allclose(shares, law[7], atol=0.015)
    assert torch.equal(drawn, draw_targets(law, torch.full((20_000,), 7), SECRET, 0))


def test_private_sums_of_little_noise_teach_a_tail(rows: Any) -> None:
    tail = rows["dp-tail", 1e-3]
    assert tail["gain"] > 0
    assert tail["token_recovery"] < 0.2


def test_the_share_is_of_the_same_data_and_seed() -> None:
    row = {"data": "a", "seed": 0, "protection": "none", "gain": 2.0}
    other = {**row, "protection": "client-tail", "gain": 1.0}
    alone = {**other, "seed": 1}
    shares = [r["gain_share"] for r in with_shares([row, other, alone])]
    assert shares == [1.0, 0.5, None]


def test_the_published_settings_are_valid() -> None:
    experiment = load_experiment("lm-frontier")
    for text in experiment.options["settings"]:
        assert text.split(":")[0] in PROTECTIONS


def test_a_setting_that_is_none_is_named(tmp_path: Path) -> None:
    options = OWN | {"data": ["a=b"], "settings": ["client-tail"]}
    experiment = Experiment("lm", "lm-frontier", "", settings_of(tmp_path), options)
    with pytest.raises(ConfigError, match="NAME:LEVEL:TARGETS"):
        run(experiment, RunFolder(tmp_path / "o", name="lm", kind="table"), Console())
