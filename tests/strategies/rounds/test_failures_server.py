"""The top, the gate and the disk, when something goes wrong there."""

from __future__ import annotations

import json
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsplit.config import RunConfig
from fedsplit.errors import LineageError, ModelError, RunError, SessionError
from fedsplit.owners.split.label_side import LabelSide
from simulations.faults.session_faults import small_disk
from strategies.rounds.recorder import Recorder
from strategies.split_tuning.optimisation import Optimisation
from strategies.split_tuning.strategy import SplitTuning
from tests.disks import small_files
from tests.strategies.failing import QUICK, warm
from tests.strategies.local_grid import LocalGrid

__all__ = ["warm"]  # a fixture that runs by itself


def test_a_gradient_that_is_not_finite_leaves_the_top_as_it_was() -> None:
    from fedsplit.config import TrainConfig

    parameter = torch.nn.Parameter(torch.ones(3))
    optimisation = Optimisation([parameter], [], TrainConfig(clip=0.0))
    for bad in (float("nan"), float("inf")):
        parameter.grad = torch.tensor([1.0, bad, 1.0])
        with pytest.raises(ModelError, match="must be finite; the step was not taken"):
            optimisation.step(0.5)
        assert torch.equal(parameter.detach(), torch.ones(3))
        assert parameter.grad is None


def plant(strategy: SplitTuning, number: int, value: float) -> None:
    """Put noise into the top at the end of round ``number``, before the gate looks."""
    honest = strategy._check_lineage

    def check(row: dict[str, Any]) -> None:
        if row["round"] == number:
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for parameter in strategy.parts.model.trainable.parameters():
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(noise * value)
        honest(row)

    strategy._check_lineage = check  # type: ignore[method-assign]


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_the_gate_restores_the_last_good_top(
    make_config: Any, run_locally: Any, tmp_path: Path, value: float
) -> None:
    # A rate that depends on the number of rounds would make the first rounds differ.
    options = QUICK | {"lineage__gate": "reject", "train__schedule": "constant"}
    options |= {"train__warmup": 0.0}
    rounds = options | {"train__rounds": 2}

    def prepare(grid: LocalGrid, strategy: SplitTuning) -> None:
        plant(strategy, 2, value)

    one = run_locally(make_config(**options))
    two = run_locally(make_config(**rounds), prepare=prepare)
    first, second = [row["lineage"] for row in two.server["rounds"]]
    assert first["verdict"] == "in_lineage"
    assert "rejected" not in first
    assert second["verdict"] != "in_lineage"
    assert second["rejected"] is True
    for name, tensor in one.state.items():
        assert torch.equal(two.state[name], tensor)


def test_a_rejected_joint_round_takes_the_bottom_back_too(
    make_config: Any, run_locally: Any
) -> None:
    options = QUICK | {"lineage__gate": "reject", "train__warmup": 0.0, "split__bottom": "joint"}
    options |= {"train__schedule": "constant", "train__bottom_lr": 1e-2}

    def prepare(grid: LocalGrid, strategy: SplitTuning) -> None:
        plant(strategy, 2, 1.0)

    one = run_locally(make_config(**options))
    two = run_locally(make_config(**options | {"train__rounds": 2}), prepare=prepare)
    for name, array in one.result.arrays.items():
        assert np.array_equal(array.numpy(), two.result.arrays[name].numpy())


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_the_gate_stops_the_run_and_leaves_the_evidence(
    make_config: Any, run_locally: Any, tmp_path: Path, value: float
) -> None:
    def prepare(grid: LocalGrid, strategy: SplitTuning) -> None:
        plant(strategy, 1, value)

    with pytest.raises(LineageError, match="round 1: the server's model"):
        run_locally(make_config(**QUICK | {"lineage__gate": "stop"}), prepare=prepare)
    row = json.loads((tmp_path / "server" / "server.json").read_text())["rounds"][0]
    assert row["lineage"]["verdict"] != "in_lineage"


def test_a_full_disk_names_the_file_and_keeps_what_is_there(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    recorder.write(status="running")
    before = (tmp_path / "server.json").read_text()
    with small_files(), pytest.raises(RunError, match=r"cannot write .*server\.json.*too large"):
        recorder.round({"round": 1})
    assert (tmp_path / "server.json").read_text() == before
    recorder.write()  # there is room again
    assert json.loads((tmp_path / "server.json").read_text())["rounds"] == [{"round": 1}]


def test_on_a_full_disk_the_file_still_tells_how_the_run_ended(tmp_path: Path) -> None:
    config = RunConfig.from_flat({"output.dir": str(tmp_path / "disk" / "server")})

    def fill_and_fail() -> None:
        with Recorder.open(config, 1) as recorder:
            recorder.round({"round": 1})
            with suppress(OSError), (tmp_path / "disk" / "rest").open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(1024))
            raise ZeroDivisionError("the run's own error")

    try:
        with small_disk(tmp_path / "disk", "64k"):
            with pytest.raises(ZeroDivisionError):
                fill_and_fail()
            told = json.loads((tmp_path / "disk" / "server" / "server.json").read_bytes())
    except SessionError as error:
        pytest.skip(str(error))
    assert told["status"] == "failed"
    assert told["error"] == "ZeroDivisionError: the run's own error"
    assert told["rounds"] == [{"round": 1}]


def test_a_second_server_leaves_the_files_of_the_first_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("strategies.rounds.recorder.WAIT_S", 0.0)
    config = RunConfig.from_flat({"output.dir": str(tmp_path / "server")})
    with Recorder.open(config, 1) as recorder:
        recorder.round({"round": 1})
        before = (tmp_path / "server" / "server.json").read_bytes()
        with (
            pytest.raises(RunError, match="another run works in this folder"),
            Recorder.open(config, 2),
        ):
            pass
        assert (tmp_path / "server" / "server.json").read_bytes() == before
    with Recorder.open(config, 2):
        pass
    assert not (tmp_path / "server" / ".lock").exists()


def test_a_disk_that_fills_during_the_run(
    make_config: Any, run_locally: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from strategies.rounds import recorder

    honest, rounds_written = recorder.Recorder.round, 0

    def round_(self: Recorder, row: dict[str, Any]) -> None:
        nonlocal rounds_written
        rounds_written += 1
        if rounds_written <= 1:
            return honest(self, row)
        with small_files():  # owners' ledgers are on disks of their own
            return honest(self, row)

    monkeypatch.setattr(recorder.Recorder, "round", round_)
    with pytest.raises(RunError, match=r"cannot write .*server\.json"):
        run_locally(make_config(**QUICK | {"train__rounds": 3}))
    told = json.loads((tmp_path / "server" / "server.json").read_text())  # there is room again
    assert told["status"] == "failed"
    assert "cannot write" in told["error"]
    assert [row["round"] for row in told["rounds"]] == [1, 2]


def test_a_disk_too_full_for_the_transcript(tmp_path: Path) -> None:
    from strategies.sessions.representation_cache import RepresentationCache

    store = RepresentationCache()
    store.put("owner-0", "train", 0, torch.ones(2, 3), torch.float32)

    with small_files(), pytest.raises(RunError, match="cannot write the transcript"):
        Recorder(tmp_path).transcript(store)
    assert not list(tmp_path.iterdir())


def test_an_owner_refuses_logits_that_are_not_finite(
    make_config: Any, run_locally: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that sends NaN learns nothing from the owner, and the run ends with a reason."""
    answered: list[int] = []
    honest = LabelSide.answer

    def answer(self: LabelSide, *args: Any) -> Any:
        answered.append(1)
        return honest(self, *args)

    def poison(body: Any, codec: str) -> bytes:
        data = encode(body, codec)
        return struct.pack("<f", float("nan")) + data[4:]

    from strategies.sessions import owner_session as member

    encode = member.encode_rows
    monkeypatch.setattr(member, "encode_rows", poison)
    monkeypatch.setattr(LabelSide, "answer", answer)
    with pytest.raises(RunError, match="must be finite"):
        run_locally(make_config(**QUICK))
    assert not answered
