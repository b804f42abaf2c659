"""``bench gpu``: what of it a machine without a card can hold, and the whole where there is one."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fedsplit.errors import ConfigError, RunError
from fedsplit.models.frozen_linear import FrozenLinear
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
SHAPES = dict.fromkeys(gpu_check.SHAPES, TINY)
needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_without_a_card_it_says_so_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    console = Console(record=True, width=160)
    figures = gpu_check.run(console)
    assert figures["rows"] == []
    assert console.export_text().strip() == gpu_check.NO_CARD


@pytest.mark.parametrize(
    ("dtype", "form"),
    [(torch.float32, "as-loaded"), (torch.bfloat16, "as-loaded"), (torch.float32, "nf4")],
)
def test_a_device_is_on_par_with_itself(dtype: torch.dtype, form: str) -> None:
    row = gpu_check.parity(CPU, dtype, TINY, form)
    assert row["good"]
    assert (row["logits"], row["gradients"]) == (0.0, 0.0)


def compute_otherwise(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Let every second outcome, the device's, be wrong by a factor."""
    real = gpu_check._outcome
    calls: list[Any] = []

    def wrong(*given: Any) -> Any:
        calls.append(given)
        logits, gradients = real(*given)
        return (logits * factor if len(calls) % 2 == 0 else logits), gradients

    monkeypatch.setattr(gpu_check, "_outcome", wrong)


def test_another_result_is_not_on_par(monkeypatch: pytest.MonkeyPatch) -> None:
    compute_otherwise(monkeypatch, 1.01)
    row = gpu_check.parity(CPU, torch.float32, TINY)
    assert not row["good"]
    assert row["logits"] == pytest.approx(0.01, rel=1e-3)
    assert row["told"].startswith("NOT within")


def test_steps_train_what_they_time() -> None:
    row = gpu_check.training(CPU, torch.float32, 8, TINY)
    assert row["steps_s"] > 0
    assert row["good"]
    assert row["last"] < row["first"]
    assert "bytes" not in row, "the memory is a card's"


def carry_out(json_path: Path | None = None, console: Console | None = None) -> dict[str, Any]:
    """Make every row on the CPU, in a small size."""
    shown = console or Console(quiet=True)
    return gpu_check.check_device(shown, CPU, json_path, minutes=5.0, steps=8, shapes=SHAPES)


def hide_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "bitsandbytes" else real(n, *a)
    )


def test_the_whole_of_it_runs_on_any_device(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hide_bitsandbytes(monkeypatch)
    figures = carry_out(tmp_path / "figures.json")
    rows = {row["row"]: row for row in figures["rows"]}
    assert all(row["good"] for row in rows.values())
    assert rows["parity nf4"]["logits"] == 0.0
    assert rows[gpu_check.NF4]["steps_s"] > 0
    assert rows[gpu_check.NF4]["last"] < rows[gpu_check.NF4]["first"]
    assert json.loads((tmp_path / "figures.json").read_text())["rows"] == figures["rows"]


def test_the_nf4_row_trains_what_a_run_would_store(monkeypatch: pytest.MonkeyPatch) -> None:
    forwards: list[str] = []
    real = FrozenLinear.forward

    def forward(self: FrozenLinear, input: torch.Tensor) -> torch.Tensor:
        forwards.append(self.form)
        return real(self, input)

    monkeypatch.setattr(FrozenLinear, "forward", forward)
    row = gpu_check.checks(CPU, 1, SHAPES)[gpu_check.NF4]()
    layers = 7 * (TINY["num_hidden_layers"] - 1)  # one block is the bottom's
    assert set(forwards) == {"nf4"}
    assert len(forwards) >= 2 * layers, "the first step and the timed one"
    assert len(forwards) % layers == 0
    assert row["steps_s"] > 0


def test_another_library_has_a_row_only_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    more = gpu_check.checks(CPU, 1, SHAPES)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    fewer = gpu_check.checks(CPU, 1, SHAPES)
    assert [name for name in more if name not in fewer] == [f"{gpu_check.NF4}, bitsandbytes"]


def test_a_device_that_computes_otherwise_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hide_bitsandbytes(monkeypatch)
    compute_otherwise(monkeypatch, 1.1)
    console = Console(record=True, width=200)
    with pytest.raises(RunError, match=r"3 of 6 .*parity float32, parity bfloat16, parity nf4"):
        carry_out(tmp_path / "figures.json", console)
    rows = {row["row"]: row for row in json.loads((tmp_path / "figures.json").read_text())["rows"]}
    assert [name for name, row in rows.items() if not row["good"]] == [
        name for name in rows if name.startswith("parity")
    ]
    shown = console.export_text()
    assert "NOT within" in shown
    assert f"{rows[gpu_check.NF4]['steps_s']:.1f}" in shown


def judged(
    monkeypatch: pytest.MonkeyPatch, path: Path, rows: dict[str, Any], clock: list[float]
) -> tuple[str, str]:
    """Run the command with these rows where there is a card; return its error and its output."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    times = iter(clock)
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: next(times))
    monkeypatch.setattr(gpu_check, "checks", lambda *given: rows)
    console = Console(record=True, width=160)
    error = ""
    try:
        gpu_check.run(console, path, minutes=1.0)
    except RunError as raised:
        error = str(raised)
    return error, console.export_text()


def test_a_row_that_fails_leaves_the_others_and_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail() -> dict[str, Any]:
        raise RuntimeError("out of memory")

    rows = {"a": fail, "b": lambda: {"steps_s": 2.0}, "c": lambda: {"steps_s": 1.0}}
    path = tmp_path / "figures.json"
    error, shown = judged(monkeypatch, path, rows, [0.0, 1.0, 2.0, 100.0])
    assert error == "bench gpu: 1 of 3 rows are not good: a"
    found = json.loads(path.read_text())["rows"]
    assert found[0]["told"] == "failed: RuntimeError: out of memory"
    assert found[1] == {"row": "b", "steps_s": 2.0}
    assert found[2]["told"] == "left out: 1 minutes are over"
    assert "out of memory" in shown


def test_a_row_without_time_left_does_not_fail_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = {"a": lambda: {"good": True}, "b": lambda: {"good": False}}
    error, shown = judged(monkeypatch, tmp_path / "figures.json", rows, [0.0, 1.0, 100.0])
    assert error == ""
    assert "left out: 1 minutes are over" in shown


def test_a_loss_that_is_no_number_fails_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "_loss", lambda logits, ids: logits.sum() * float("nan"))
    row = gpu_check.training(CPU, torch.float32, 1, TINY)
    assert not row["good"]
    assert row["told"] == "the loss is nan"


@pytest.mark.parametrize("change", [{"minutes": 0.0}, {"steps": 0}])
def test_numbers_out_of_range_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be >"):
        gpu_check.run(Console(), **change)


@needs_card
@pytest.mark.timeout(600)
def test_a_card_is_on_par_with_the_cpu() -> None:
    rows = {row["row"]: row for row in gpu_check.run(Console(), minutes=7.0, steps=3)["rows"]}
    assert all(row["good"] for name, row in rows.items() if name.startswith("parity"))
    assert rows[gpu_check.NF4]["steps_s"] > 0
    assert rows[gpu_check.NF4]["bytes"] > 0
