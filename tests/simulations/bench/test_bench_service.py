"""Many owners and one session server: every question is answered once, in whatever company."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fedsplit.errors import ConfigError
from simulations.bench import service as bench_service
from simulations.bench.service import serve, together


def test_owners_of_another_process_are_answered(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_service, "PROCESSES", 1)
    config = make_config(strategy="serving", split__k=1, serving__max_wait_ms=50.0)
    rows = tmp_path / "rows.safetensors"
    save_file({str(i): torch.randn(3 + i, 32) for i in range(4)}, rows)

    found = serve(replace(config, serving=replace(config.serving, max_batch=4)), rows, 3, 2)

    assert len(found["latencies"]) == 3 * 2
    assert min(found["latencies"]) > 0
    assert 1 <= found["texts_per_forward"] <= 4
    assert found["steps_per_s"] > 0


def test_repeats_are_put_together_by_their_median_and_all_latencies() -> None:
    one = {"steps_per_s": 1.0, "latencies": [1.0, 2.0], "bytes_per_owner": 4.0}
    two = {"steps_per_s": 3.0, "latencies": [3.0, 9.0], "bytes_per_owner": 8.0}
    found = together([one, two])
    assert (found["steps_per_s"], found["bytes_per_owner"], found["n"]) == (2.0, 6.0, 4)
    assert (found["p50_s"], found["p99_s"]) == (2.0, 9.0)
    assert found["all_steps_per_s"] == [1.0, 3.0]


@pytest.mark.parametrize(("name", "value"), [("owners", 0), ("owners", 201), ("steps", 0)])
def test_numbers_out_of_range_are_refused(name: str, value: int) -> None:
    numbers = {"owners": 1, "steps": 1, "repeats": 1, "training": 0} | {name: value}
    with pytest.raises(ConfigError, match=f"{name}={value}: must be in"):
        bench_service.run(None, None, **numbers)  # type: ignore[arg-type]
