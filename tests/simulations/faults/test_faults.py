"""The fault experiment's own parts: it must not report what it did not do."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from fedsplit.errors import ConfigError
from simulations.core.run_folder import RunFolder
from simulations.core.settings import load_experiment
from simulations.faults.fault_matrix import run
from simulations.faults.process_faults import KillTrigger
from simulations.faults.proxy import Proxy
from simulations.faults.testbed import describe_loss


@pytest.mark.parametrize(
    "override",
    [
        'options.sessions=["earthquake"]',
        "options.session-moments=[1.5]",
        'options.processes=["Kernel"]',
        'options.process-moments=["noon"]',
        "options.colour=3",
    ],
)
def test_what_is_unknown_is_refused_before_anything_runs(tmp_path: Path, override: str) -> None:
    quiet = ["options.sessions=[]"] if "processes" in override or "process-" in override else []
    loaded = load_experiment("faults", [*quiet, override])
    with (
        pytest.raises(ConfigError, match=r"must be"),
        RunFolder(tmp_path / "run", name="faults", kind="table") as folder,
    ):
        run(loaded, folder, Console(quiet=True))


def state(folder: Path, number: int, round_: int, stage: str) -> None:
    path = folder / "state"
    path.mkdir(parents=True, exist_ok=True)
    draft = path / "draft"
    draft.write_text(json.dumps({"number": number, "facts": {"round": round_, "stage": stage}}))
    draft.rename(path / f"state-{number:06d}.json")


def until(true: object, what: str) -> None:
    end = time.monotonic() + 60
    while not true():  # type: ignore[operator]
        assert time.monotonic() < end, what
        time.sleep(0.01)


def test_a_kill_comes_at_its_moment_and_the_next_state_is_noted(tmp_path: Path) -> None:
    killed = threading.Event()
    trigger = KillTrigger(tmp_path, "between rounds", killed.set)
    for number, stage in enumerate(("step", "trained"), start=1):
        state(tmp_path, number, 1, stage)
    time.sleep(0.3)
    assert not killed.is_set(), "too early"
    state(tmp_path, 3, 1, "evaluated")
    until(killed.is_set, "it should have been killed")
    assert not trigger.again
    state(tmp_path, 4, 2, "step")
    until(lambda: trigger.again, "the next state should have been seen")
    trigger.stop()


def test_a_moment_that_never_comes_is_told(tmp_path: Path) -> None:
    trigger = KillTrigger(tmp_path, "second round", lambda: None)
    trigger.stop()
    assert not trigger.killed


def test_what_isdescribe_loss() -> None:
    import torch

    model, other = {"w": torch.ones(2)}, {"w": torch.zeros(2)}
    sound = {"rounds": [{"round": 1, "train": {"lost": {}}}]}
    hurt = {"rounds": [{"round": 1, "train": {"lost": {"a": "gone"}}}]}
    assert describe_loss("", model, model, sound) == "nothing"
    assert describe_loss("", other, model, sound).startswith("bits")
    assert describe_loss("", model, model, hurt) == "a in round 1, train: gone"
    assert describe_loss("it broke", {}, model, {}) == "the run: it broke"


@pytest.fixture
def echo() -> Iterator[int]:
    """A TCP server that sends back what comes; yields its port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(one: socket.socket) -> None:
        with one:
            try:
                while data := one.recv(1 << 16):
                    one.sendall(data)
            except OSError:
                pass

    def accept() -> None:
        while True:
            try:
                one, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(one,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield listener.getsockname()[1]
    listener.close()


def answer(port: int, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as one:
        one.sendall(data)
        one.shutdown(socket.SHUT_WR)
        found = b""
        while part := one.recv(1 << 16):
            found += part
    return found


def broken(port: int, data: bytes) -> bool:
    try:
        return answer(port, data) != data
    except OSError:
        return True


def test_the_proxy_does_what_it_is_told(echo: int) -> None:
    data = bytes(range(256)) * 4
    with Proxy(echo) as proxy:
        assert answer(proxy.port, data) == data
        proxy.flip()
        found = answer(proxy.port, data)
        assert sum(a != b for a, b in zip(found, data, strict=True)) == 1
        proxy.cut(600)
        assert broken(proxy.port, data)
        proxy.cut()
        began = time.monotonic()
        proxy.stall(0.5)
        assert answer(proxy.port, data) == data
        assert time.monotonic() - began >= 0.4
        proxy.truncate(100)
        assert broken(proxy.port, data)
