"""``bench gpu``: what of it a machine without a card can hold, and the whole where there is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rich.console import Console

from fedsplit.errors import ConfigError
from simulations.bench import gpu_check

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
}
CPU = torch.device("cpu")
needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_without_a_card_it_says_so_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    console = Console(record=True, width=160)
    figures = gpu_check.run(console)
    assert figures["rows"] == []
    assert console.export_text().strip() == gpu_check.NO_CARD


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_device_is_on_par_with_itself(dtype: torch.dtype) -> None:
    row = gpu_check.parity(CPU, dtype, TINY)
    assert row["good"]
    assert (row["logits"], row["gradients"]) == (0.0, 0.0)


def test_another_result_is_not_on_par(monkeypatch: pytest.MonkeyPatch) -> None:
    real = gpu_check._outcome
    calls: list[Any] = []

    def wrong(*given: Any) -> Any:
        calls.append(given)
        logits, gradients = real(*given)
        return (logits * 1.01 if len(calls) == 2 else logits), gradients

    monkeypatch.setattr(gpu_check, "_outcome", wrong)
    row = gpu_check.parity(CPU, torch.float32, TINY)
    assert not row["good"]
    assert row["logits"] == pytest.approx(0.01, rel=1e-3)
    assert row["told"].startswith("NOT within")


def test_steps_train_what_they_time() -> None:
    row = gpu_check.training(CPU, torch.float32, 8, TINY)
    assert row["steps_s"] > 0
    assert row["last"] < row["first"]
    assert "bytes" not in row, "the memory is a card's"


def test_a_row_that_fails_or_comes_too_late_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    clock = iter([0.0, 1.0, 2.0, 100.0])
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: next(clock))

    def fail() -> dict[str, Any]:
        raise RuntimeError("out of memory")

    rows = {"a": fail, "b": lambda: {"steps_s": 2.0}, "c": lambda: {"steps_s": 1.0}}
    monkeypatch.setattr(gpu_check, "checks", lambda device, steps: rows)
    console = Console(record=True, width=160)
    found = gpu_check.run(console, minutes=1.0)["rows"]
    assert found[0]["told"] == "failed: RuntimeError: out of memory"
    assert found[1] == {"row": "b", "steps_s": 2.0}
    assert found[2]["told"] == "left out: 1 minutes are over"
    assert "out of memory" in console.export_text()


@pytest.mark.parametrize("change", [{"minutes": 0.0}, {"steps": 0}])
def test_numbers_out_of_range_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be >"):
        gpu_check.run(Console(), **change)


@needs_card
@pytest.mark.timeout(600)
def test_a_card_is_on_par_with_the_cpu() -> None:
    rows = gpu_check.run(Console(), minutes=3.0, steps=3)["rows"]
    assert all(row["good"] for row in rows if row["row"].startswith("parity"))
    assert all("failed" not in row.get("told", "") for row in rows)
