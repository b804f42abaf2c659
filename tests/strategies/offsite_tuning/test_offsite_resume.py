"""An offsite run that is killed and started again ends with the adapters of one that was not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.serverapp.strategy import FedAvgM
from safetensors.torch import load_file, save_file

from fedsplit.config import RunConfig
from fedsplit.errors import RunError
from strategies.offsite_tuning.export import ADAPTERS
from strategies.offsite_tuning.strategy import OffsiteTuning
from tests.strategies.local_grid import LocalGrid

Adapters = dict[str, torch.Tensor]


class Killed(RunError):
    """Stands for the end of the process."""


def carry_out(config: RunConfig, *, run_id: int = 7, dies_in: int = 0, **options: Any) -> Adapters:
    """Run to the end, or until a round of training begins; return the adapters."""
    torch.manual_seed(run_id)  # nothing may hang on what the process drew before
    grid = LocalGrid(config, config.data.owners, run_id=run_id, first=1000 * run_id)
    with OffsiteTuning.open(config, run_id=run_id, **options) as strategy:
        honest, first = strategy.configure_train, strategy.rounds_done

        def configure_train(number: int, *args: Any) -> Any:
            if first + number == dies_in:
                raise Killed(f"killed before round {dies_in}")
            return honest(number, *args)

        strategy.configure_train = configure_train  # type: ignore[method-assign]
        strategy.start(grid)
    return load_file(Path(config.output.dir) / ADAPTERS)


def interrupted(config: RunConfig, *, dies_in: int = 3, **options: Any) -> None:
    with pytest.raises(Killed):
        carry_out(config, run_id=8, dies_in=dies_in, **options)


def server(config: RunConfig) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(config.output.dir) / "server.json").read_text())
    return found


def equal(one: Adapters, other: Adapters) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("averaging", ["fedavg", "fedadam"])  # the second carries moments
def test_an_interrupted_run_goes_on_where_it_was(
    offsite: Any, tmp_path: Path, averaging: str
) -> None:
    whole = carry_out(offsite(offsite__averaging=averaging, output__dir=str(tmp_path / "whole")))
    config = offsite(offsite__averaging=averaging)
    interrupted(config)
    assert equal(carry_out(config, run_id=9), whole)
    told = server(config)
    assert [row["round"] for row in told["rounds"]] == [1, 2, 3]
    assert told["resumed"][0]["after_round"] == 2
    assert told["emulator"]["kept"], "owners have the emulator of the first start"
    assert not (Path(config.output.dir) / "state").exists(), "nothing is left to go on with"


def test_flowers_own_momentum_goes_on_too(offsite: Any, tmp_path: Path) -> None:
    def own() -> FedAvgM:
        return FedAvgM(server_momentum=0.5)

    whole = carry_out(offsite(output__dir=str(tmp_path / "whole")), averaging=own())
    config = offsite()
    interrupted(config, averaging=own())
    assert equal(carry_out(config, run_id=9, averaging=own()), whole)


def test_a_damaged_state_gives_way_to_the_one_before(offsite: Any, tmp_path: Path) -> None:
    options = {"offsite__method": "lora", "output__evaluate_every": 0}
    whole = carry_out(offsite(**options, output__dir=str(tmp_path / "whole")))
    config = offsite(**options)
    interrupted(config)
    newest = max((Path(config.output.dir) / "state").glob("tensors-*"))
    newest.write_bytes(newest.read_bytes()[:-3])
    assert equal(carry_out(config, run_id=9), whole)
    told = server(config)
    assert [row["round"] for row in told["rounds"]] == [1, 2, 3]
    assert told["resumed"][0]["after_round"] == 1


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"offsite__keep": 2}, "offsite.keep=1"),
        ({"train__lr": 0.2}, "train.lr=0.1"),
        ({"offsite__method": "lora"}, "offsite.method='full'"),
    ],
)
def test_a_run_of_other_settings_is_refused_by_name(
    offsite: Any, overrides: dict[str, Any], named: str
) -> None:
    config = offsite()
    interrupted(config, dies_in=2)
    recipe = Path(config.output.dir) / "emulator-recipe.json"
    before = recipe.read_bytes()
    with pytest.raises(RunError, match=f"interrupted run with .*{named}"):
        carry_out(offsite(**overrides), run_id=9)
    assert recipe.read_bytes() == before, "the interrupted run must still be able to go on"


@pytest.mark.parametrize("name", ["adapters.safetensors", "averaging.safetensors"])
def test_a_folder_of_the_first_version_is_refused(offsite: Any, name: str) -> None:
    config = offsite()
    folder = Path(config.output.dir)
    folder.mkdir()
    save_file({"x": torch.ones(2)}, folder / name, {"round": "2", "emulator": "d", "method": "{}"})
    before = (folder / name).read_bytes()
    with pytest.raises(RunError, match="a run of an earlier version cannot be gone on with"):
        carry_out(config)
    assert (folder / name).read_bytes() == before
    (folder / name).write_bytes(b"x")
    with pytest.raises(RunError, match="unreadable"):
        carry_out(config)
