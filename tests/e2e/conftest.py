"""Fixtures for tests with real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from simulations.runtime.environment import ray_credentials
from tests.e2e.two_nodes import CLUSTER, TwoNodes


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TwoNodes]:
    token = ray_credentials()
    for name, value in token.items():
        monkeypatch.setenv(name, value)
    folder = Path(f"/tmp/fs-{os.getpid()}")  # a socket's path must be short
    rest = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    quick = {"RAY_health_check_period_ms": "500", "RAY_health_check_initial_delay_ms": "0"}
    quick["RAY_worker_niceness"] = "0"  # Ray's is 15: beside other work hosts would never start
    env = {**rest, **token, **quick, "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": str(folder)}
    folder.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        env=env,
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        told = next(line for line in process.stdout if line.startswith("address "))
        yield TwoNodes(told.split()[1], process, folder)
    finally:
        children = psutil.Process(process.pid).children(recursive=True)
        try:
            process.communicate("stop\n", timeout=30)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            process.kill()
        for child in children:
            if child.is_running():
                child.kill()
        subprocess.run(["rm", "-rf", str(folder)], check=False)
