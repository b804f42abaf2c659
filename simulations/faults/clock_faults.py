"""A jump of the machine's clock, by libfaketime around a whole process.

The wall clock of a process of its own is moved while owners and server are at work; the monotonic
clock goes on as on a real machine.  libfaketime stands between the process and the C library, so
that Python, gRPC and OpenSSL see the same jump.
"""

from __future__ import annotations

import ctypes.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedsplit import storage
from fedsplit.config import RunConfig
from fedsplit.errors import SessionError
from simulations.faults.proxy import Proxy
from simulations.faults.testbed import Fault, FaultTestbed, Row
from simulations.runtime.local_grid import LocalGrid

HOUR_S = 3600
JUMPS_S = (HOUR_S, -HOUR_S)
LIBRARY = "faketime/libfaketimeMT.so.1"
TIMEOUT_S = 1800.0


def library() -> Path | None:
    """Return where libfaketime is, None where it is not installed."""
    found = ctypes.util.find_library("faketimeMT")
    paths = [Path(found)] if found and os.path.isabs(found) else []
    paths += [Path("/usr/lib") / LIBRARY, *Path("/usr/lib").glob(f"*-linux-gnu/{LIBRARY}")]
    return next((path for path in paths if path.exists()), None)


def in_a_process(config: RunConfig, folder: Path, case: str, moments: list[float]) -> list[Row]:
    """Carry out the jumps in a process whose wall clock can be moved.

    Raises:
        SessionError: libfaketime is missing, or the process failed.
    """
    preload = library()
    if preload is None:
        raise SessionError("libfaketime is not installed (Debian package: faketime)")
    folder.mkdir(parents=True, exist_ok=True)
    task, offset, out = folder / "task.json", folder / "offset", folder / "rows.json"
    task.write_text(
        json.dumps({"config": dict(config.to_flat()), "case": case, "moments": moments})
    )
    offset.write_text("+0")
    variables = {
        "LD_PRELOAD": str(preload),
        "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "simulations.faults.clock_faults", str(folder)],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    if done.returncode or not out.exists():
        raise SessionError(f"the process ended with {done.returncode}: {done.stderr[-300:]}")
    rows: list[Row] = json.loads(out.read_text())
    return rows


def jump(offset: Path, seconds: int) -> str:
    """Move this process's wall clock and say by how much it moved, as seen from here."""
    before, steady = time.time(), time.monotonic()
    storage.write(offset, f"{seconds:+d}", durable=False)
    moved = time.time() - before - (time.monotonic() - steady)
    return f"wall clock {moved:+.0f} s"


def _rows(folder: Path) -> Iterator[Row]:
    task: dict[str, Any] = json.loads((folder / "task.json").read_text())
    offset = folder / "offset"
    testbed = FaultTestbed(RunConfig.from_flat(task["config"]), folder / "runs")
    for number, moment in enumerate(task["moments"]):
        for seconds in JUMPS_S:

            def act(proxy: Proxy, grid: LocalGrid, seconds: int = seconds) -> str:
                return jump(offset, seconds)

            fault = Fault(moment, act)
            outcome = testbed.start(f"jump-{number}{seconds:+d}", fault)
            jump(offset, 0)
            told = f"{moment:.0%} of bytes, {'+' if seconds > 0 else '-'}1 h"
            yield testbed.row(task["case"], told, outcome, fault)


def main(folder: Path) -> None:
    """Write the rows of every jump to ``rows.json``; the process's clock must be libfaketime's."""
    if "FAKETIME_TIMESTAMP_FILE" not in os.environ:
        raise SystemExit("this needs libfaketime around it: python -m simulations run faults")
    rows = list(_rows(folder))
    storage.write(folder / "rows.json", json.dumps(rows), durable=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
