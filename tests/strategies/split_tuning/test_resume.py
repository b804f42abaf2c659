"""A run that is killed and started again ends with the very model of one that was not."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, RecordDict
from safetensors.torch import load_file

from fedsplit.config import RunConfig
from fedsplit.errors import RunError
from fedsplit.fingerprints.evidence import chain as evidence
from fedsplit.owners.ledger.chain import read_ledger
from fedsplit.wire.frames import Frame, Kind, decode
from strategies import STRATEGIES
from strategies.rounds.run_checkpoint import RunCheckpoint
from strategies.rounds.state_folder import StateFolder
from strategies.split_tuning.cohort import Cohort
from strategies.split_tuning.strategy import SplitTuning
from tests.disks import small_files
from tests.strategies.local_grid import LocalGrid

ROUNDS, STEPS = 2, 3
QUICK: dict[str, Any] = {
    "train__rounds": ROUNDS,
    "train__max_steps": STEPS,
    "privacy__mechanism": "dchi",
    "privacy__eta": 40.0,
    "output__checkpoint_steps": 1,
    "lineage__gate": "off",
    "session__reconnect_s": 1.0,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "frozen": {},
    "waves": {"session__wave": 2},
    "sequential": {"session__schedule": "sequential"},
    "joint": {"split__bottom": "joint"},
    "owners' head": {"labels__protection": "client-head"},
}


class Killed(RunError):
    """Stands for the end of the process."""


def carry_out(config: RunConfig, *, run_id: int = 7) -> dict[str, torch.Tensor]:
    """Run to the end, as the ServerApp does; every start has a run id and node ids of its own."""
    torch.manual_seed(run_id)  # nothing may hang on what the process drew before
    grid = LocalGrid(config, config.data.owners, run_id=run_id, first=1000 * run_id)
    flat = dict(config.to_flat())
    context = Context(run_id=run_id, node_id=0, node_config={}, state=RecordDict(), run_config=flat)
    STRATEGIES["split-tuning"](grid, context, config)
    return load_file(Path(config.output.dir) / "top.safetensors")


def server(config: RunConfig) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(config.output.dir) / "server.json").read_text())
    return found


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def dies(
    owner: Any, name: str, at: int, *, after: bool = False
) -> Callable[[pytest.MonkeyPatch], None]:
    """Return what kills the run in the ``at``-th call of a method, before or after it."""

    def install(monkeypatch: pytest.MonkeyPatch) -> None:
        honest, calls = getattr(owner, name), 0

        def method(self: Any, *args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at and not after:
                raise Killed(f"killed before {name}")
            result = honest(self, *args, **options)
            if calls == at:
                raise Killed(f"killed after {name}")
            return result

        monkeypatch.setattr(owner, name, method)

    return install


MOMENTS = {
    "before anything": dies(SplitTuning, "configure_train", 1),
    "in the first step": dies(Cohort, "_step", 1),
    "in the second step": dies(Cohort, "_step", 2),
    "after the third step": dies(Cohort, "_step", 3, after=True),
    "before the round's state": dies(RunCheckpoint, "_save", STEPS),
    "before its evaluation": dies(SplitTuning, "configure_evaluate", 1),
    "in its evaluation": dies(Cohort, "_answer", 1),
    "after its evaluation": dies(SplitTuning, "aggregate_evaluate", 1, after=True),
    "in the next round": dies(Cohort, "_step", STEPS + 2),
    "at the very end": dies(SplitTuning, "aggregate_evaluate", ROUNDS, after=True),
}


@pytest.fixture(scope="module")
def straight() -> dict[str, dict[str, torch.Tensor]]:
    """Models of runs that nothing interrupted, by variant."""
    return {}


def uninterrupted(
    make_config: Any, straight: dict[str, Any], variant: str, tmp_path: Path
) -> dict[str, torch.Tensor]:
    if variant not in straight:
        options = QUICK | VARIANTS[variant]
        straight[variant] = carry_out(make_config(**options, output__dir=str(tmp_path / "whole")))
    model: dict[str, torch.Tensor] = straight[variant]
    return model


def interrupt(config: RunConfig, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        MOMENTS[moment](patched)
        with pytest.raises(RunError, match="killed"):
            carry_out(config, run_id=8)


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_model_is_the_uninterrupted_ones(
    make_config: Any,
    straight: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    moment: str,
) -> None:
    expected = uninterrupted(make_config, straight, "frozen", tmp_path)
    config = make_config(**QUICK)
    interrupt(config, moment, monkeypatch)
    assert equal(carry_out(config, run_id=9), expected)
    told = server(config)
    assert [row["round"] for row in told["rounds"]] == [1, 2]
    assert all("train" in row and "evaluate" in row for row in told["rounds"])
    assert all(row["train"]["steps"] == STEPS for row in told["rounds"])
    assert not (Path(config.output.dir) / "state").exists(), "nothing is left to go on with"


@pytest.mark.parametrize(
    ("variant", "moment"),
    [
        ("waves", "in the second step"),
        ("waves", "in the next round"),
        ("sequential", "in the second step"),
        ("joint", "before its evaluation"),
        ("joint", "in the next round"),
        ("owners' head", "in the next round"),
    ],
)
def test_so_it_is_whatever_owners_train_and_however_they_step(
    make_config: Any,
    straight: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    variant: str,
    moment: str,
) -> None:
    expected = uninterrupted(make_config, straight, variant, tmp_path)
    config = make_config(**QUICK | VARIANTS[variant])
    interrupt(config, moment, monkeypatch)
    assert equal(carry_out(config, run_id=9), expected)


# ---- what owners show and write down ------------------------------------------------------------


def frames(config: RunConfig, run_id: int) -> Iterator[tuple[int, Frame, bytes]]:
    """Yield (owner, frame, its bytes) for everything that reached the server in one start."""
    nodes = {1000 * run_id + 17 * (config.data.owners - i): i for i in range(config.data.owners)}
    for node, owner in nodes.items():
        for path in (Path(config.output.dir) / "capture").glob(f"{node}-*.bin"):
            data = path.read_bytes()
            at = 0
            while at < len(data):
                end = at + 8 + int.from_bytes(data[at : at + 8], "little")
                yield owner, decode(data[at + 8 : end], 1 << 30), data[at + 8 : end]
                at = end


def rows(config: RunConfig, run_id: int) -> dict[tuple[int, str, int], bytes]:
    """Return the representations sent in one start: (owner, mode by batch size, slot) -> bytes."""
    found: dict[tuple[int, str, int], bytes] = {}
    for owner, frame, _ in frames(config, run_id):
        if frame.kind is Kind.BATCH and frame["fresh"]:
            body, at = bytes(frame.body), 0
            mode = "train" if len(frame["slots"]) <= config.train.batch_size else "test"
            for slot, length in zip(frame["fresh"], frame["lengths"], strict=True):
                size = 4 * length * frame["dim"]
                found[owner, mode, slot] = body[at : at + size]
                at += size
    return found


def test_an_owner_shows_nothing_new_and_writes_everything_down(
    make_config: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = QUICK | {"output__checkpoint_steps": 0, "output__capture": True}
    config = make_config(**options, output__evaluate_every=0)
    interrupt(config, "in the next round", monkeypatch)
    carry_out(config, run_id=9)
    first, again = rows(config, 8), rows(config, 9)
    both = first.keys() & again.keys()
    assert both, "the interrupted round should have sent what the state does not hold"
    assert all(first[key] == again[key] for key in both), "noise must not be drawn again"
    for owner in range(3):
        lines = list(read_ledger(tmp_path / "homes" / f"owner-{owner}"))  # its chain is whole
        written = {line["digest"] for line in lines}
        for run_id in (8, 9):
            for who, frame, _ in frames(config, run_id):
                if who == owner and frame.kind in (Kind.BATCH, Kind.GRAD) and frame.body:
                    assert hashlib.sha256(frame.body).hexdigest() in written
        assert {line["run"] for line in lines if "run" in line} == {"8", "9"}
        drawn = [line["cumulative"]["views"]["max"] for line in lines if "cumulative" in line]
        assert set(drawn) == {1}


def test_the_evidence_goes_on(
    make_config: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = make_config(**QUICK | {"lineage__gate": "reject"})
    interrupt(config, "before the round's state", monkeypatch)
    chain = Path(config.output.dir) / "lineage.jsonl"
    before = chain.read_bytes()
    with chain.open("ab") as file:
        file.write(b'{"version": 1, "rou')  # a line that the crash cut off
    carry_out(config, run_id=9)
    assert chain.read_bytes().startswith(before), "no line may be lost"
    assert evidence.verify(chain) == 3
    records = list(evidence.read(chain))
    assert [record.round for record in records] == [1, 1, 2]
    assert records[1].body["details"]["resumed"] == {"known": 0, "repeated": 1}
    assert records[0].body["weights"] == records[1].body["weights"], "the same round again"
    assert (chain.parent / "lineage.torn").read_bytes() == b'{"version": 1, "rou'


# ---- states that cannot be used -----------------------------------------------------------------


def test_a_damaged_state_gives_way_to_the_one_before(
    make_config: Any, straight: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = uninterrupted(make_config, straight, "frozen", tmp_path)
    config = make_config(**QUICK)
    interrupt(config, "in the next round", monkeypatch)
    newest = max((Path(config.output.dir) / "state").glob("tensors-*"))
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    assert equal(carry_out(config, run_id=9), expected)
    (told,) = server(config)["resumed"]
    assert "do not fit its digest" in told["skipped"][0]


def test_a_run_of_other_settings_is_refused_by_name(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(**QUICK)
    interrupt(config, "in the next round", monkeypatch)
    kept = sorted((Path(config.output.dir) / "state").iterdir())
    for setting, value in {"train.lr": 0.5, "seed": 3, "privacy.eta": 41.0}.items():
        other = RunConfig.from_flat({**config.to_flat(), setting: value})
        with pytest.raises(RunError, match=f"interrupted run with {setting}="):
            carry_out(other, run_id=9)
        assert sorted((Path(config.output.dir) / "state").iterdir()) == kept
    where = replace(config, session=replace(config.session, deadline_s=30.0))
    carry_out(where, run_id=10)  # how it is carried out may change


def test_a_run_of_the_first_version_is_refused(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(**QUICK)
    interrupt(config, "in the next round", monkeypatch)
    folder = Path(config.output.dir) / "state"
    for path in folder.glob("state-*.json"):
        path.write_text(path.read_text().replace("fedsplit-state-2", "fedsplit-state-1"))
    kept = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(RunError, match=r"another version, format 'fedsplit-state-1'"):
        carry_out(config, run_id=9)
    assert {path: path.read_bytes() for path in folder.iterdir()} == kept


# ---- the folder ---------------------------------------------------------------------------------


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"x": torch.full((4,), value)}


def test_a_folder_keeps_two_states_and_what_they_name(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "state", {"a": 1})
    for number in range(5):
        folder.save({"n": number}, tensors(number), {f"s{number}": torch.ones(2)})
    folder.save({"n": 5})  # only facts differ
    folder.close()
    names = sorted(path.name for path in folder.path.iterdir())
    assert [n for n in names if n.startswith("state")] == ["state-000005.json", "state-000006.json"]
    assert [n for n in names if n.startswith("tensors")] == ["tensors-000005.safetensors"]
    again = StateFolder(tmp_path / "state", {"a": 1})
    state = again.load()
    assert state is not None
    assert state.facts == {"n": 5}
    assert torch.equal(state.tensors["x"], torch.full((4,), 4.0))
    assert [sorted(load_file(path)) for path in state.segments] == [[f"s{n}"] for n in range(5)]
    again.clear()
    again.close()
    assert not (tmp_path / "state").exists()


def test_a_state_from_before_a_setting_has_its_default(tmp_path: Path) -> None:
    older = StateFolder(tmp_path / "state", {"a": 1})
    older.save({"n": 1}, tensors(1.0))
    older.close()
    newer = StateFolder(tmp_path / "state", {"a": 1, "b": 2}, usual={"a": 7, "b": 2})
    assert newer.load() is not None
    newer.close()
    other = StateFolder(tmp_path / "state", {"a": 1, "b": 3}, usual={"a": 7, "b": 2})
    with pytest.raises(RunError, match="b=2: must be 3"):
        other.load()
    other.close()


def test_two_runs_never_share_a_folder(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "state", {})
    with pytest.raises(RunError, match="another run works in this folder"):
        StateFolder(tmp_path / "state", {}, wait_s=0.1)
    folder.close()
    StateFolder(tmp_path / "state", {}, wait_s=0.1).close()


def test_a_full_disk_leaves_the_state_before(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "state", {})
    folder.save({"n": 1}, tensors(1.0))
    for most in (0, 100):  # of neither file, or of the tensors alone
        with small_files(most), pytest.raises(RunError, match=r"cannot write .*state"):
            folder.save({"n": 2}, tensors(2.0))
    folder.close()
    again = StateFolder(tmp_path / "state", {})
    state = again.load()
    assert state is not None
    assert state.facts == {"n": 1}
    again.save({"n": 3}, tensors(3.0))
    assert not [p for p in again.path.iterdir() if "draft" in p.name]
    again.close()


def test_nothing_sound_is_an_end_and_no_silent_beginning(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "state", {})
    folder.save({"n": 1}, tensors(1.0))
    folder.close()
    (tmp_path / "state" / "state-000001.json").write_text("{}")
    again = StateFolder(tmp_path / "state", {})
    with pytest.raises(RunError, match="none of 1 states can be used"):
        again.load()
    again.close()


# ---- a real kill --------------------------------------------------------------------------------


def test_kill_9(
    make_config: Any, straight: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = uninterrupted(make_config, straight, "frozen", tmp_path)
    config = make_config(**QUICK)
    code = (
        "import json, sys, time\n"
        "from fedsplit.config import RunConfig\n"
        "from strategies.split_tuning.cohort import Cohort\n"
        "from tests.strategies.split_tuning.test_resume import carry_out\n"
        "honest = Cohort._step\n"
        "def slow(self, *args):\n"
        "    time.sleep(0.3)\n"  # so that the kill comes in the middle of something
        "    return honest(self, *args)\n"
        "Cohort._step = slow\n"
        "carry_out(RunConfig.from_flat(json.loads(sys.argv[1])), run_id=8)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(config.to_flat())],
        cwd=Path(__file__).parents[3],
        env=dict(os.environ),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    state = Path(config.output.dir) / "state"
    until = time.monotonic() + 90
    while not (state / "state-000002.json").exists():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < until, "it should have kept a second state"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert state.exists(), "the run should have been interrupted"
    assert equal(carry_out(config, run_id=9), expected)
    assert server(config)["resumed"][0]["state"] >= 2
