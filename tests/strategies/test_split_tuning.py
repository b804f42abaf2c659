"""Laws of split tuning, with real sessions and messages within one process."""

from __future__ import annotations

from typing import Any

import torch


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 0.0) -> bool:
    assert a.keys() == b.keys()
    return all(float((a[n] - b[n]).abs().max()) <= tolerance for n in a)


def test_a_run_trains_the_top_and_reports_every_round(make_config: Any, run_locally: Any) -> None:
    config = make_config()
    run = run_locally(config)
    rounds = run.server["rounds"]
    assert [r["round"] for r in rounds] == [1, 2]
    for row in rounds:
        assert row["train"]["finished"] == ["owner-0", "owner-1", "owner-2"]
        assert row["train"]["lost"] == {}
        assert row["train"]["steps"] == 3
        assert 0 <= row["evaluate"]["metrics"]["accuracy"] <= 1
        assert row["lineage"]["verdict"] in ("in_lineage", "not_shown", "independent")


def test_same_seed_same_model(make_config: Any, run_locally: Any) -> None:
    first = run_locally(make_config()).state
    again = run_locally(make_config()).state
    other = run_locally(make_config(seed=1)).state
    assert equal(first, again)
    assert not equal(first, other)
