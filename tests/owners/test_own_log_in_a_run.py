"""Whose log lines are whose, in a run whose owners and server share one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def test_an_owners_lines_stay_in_its_own_home(
    make_config: Any, run_locally: Any, tmp_path: Path
) -> None:
    def asked(grid: Any, strategy: Any) -> None:
        grid.node_configs[1] = {"log-json": True}

    run = run_locally(make_config(), prepare=asked)

    homes = sorted((tmp_path / "homes").iterdir())
    (log,) = [home / "log.jsonl" for home in homes if (home / "log.jsonl").exists()]
    lines = [json.loads(line) for line in log.read_bytes().splitlines()]
    assert log.parent.name == "owner-1"
    assert lines
    assert {line["owner"] for line in lines} == {"owner-1"}
    assert {line["logger"].split(".")[0] for line in lines} == {"fedsplit"}
    assert {line["round"] for line in lines} <= {1, 2}
    assert all(line["mode"] in ("train", "evaluate") for line in lines)
    assert run.server["rounds"][-1]["train"]["finished"] == ["owner-0", "owner-1", "owner-2"]
