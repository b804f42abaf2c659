"""A disk that takes no more logs hides nothing of a run, and holds nobody up."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from fedsplit.errors import RunError
from simulations.runtime import Simulation
from simulations.runtime.child_processes import Child, ProcessGroup


def full(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_why_a_run_failed_is_told_where_its_logs_cannot_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulation = Simulation(2, log_dir=tmp_path / "log")
    simulation.log_dir.mkdir()
    simulation._processes = ProcessGroup(tmp_path)
    logs = simulation._processes.ray_root / "ray" / "session_latest" / "logs"
    logs.mkdir(parents=True)
    (logs / "worker.err").write_text("what an actor wrote")
    monkeypatch.setattr(shutil, "copy", full)
    app = Child("serverapp", ["true"], env={}, cwd=tmp_path, log_path=tmp_path / "app.log")
    row = {"run-id": 3, "status": "finished:failed", "status-details": "the run's own error"}

    with pytest.raises(RunError, match=r"run 3 is finished:failed .*: the run's own error"):
        simulation._verdict(app, row, 1.0)
    simulation.stop()


def test_a_child_whose_log_cannot_be_made_is_read_to_its_end(tmp_path: Path) -> None:
    nowhere = tmp_path / "missing" / "x.log"
    child = Child("x", ["seq", "50000"], env=dict(os.environ), cwd=tmp_path, log_path=nowhere)
    assert child.process.wait(30) == 0
    child.finish_log()
    assert child.tail[-1] == "50000"
