"""``bench memory`` at a small size: every way is measured, and mapping is told from holding."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from fedsplit.errors import ConfigError
from simulations.bench import memory


def test_every_way_has_a_row(tmp_path: Path) -> None:
    console = Console(record=True, width=160)
    figures = memory.run(console, tmp_path / "m.json", layers=3, width=128, k=1)
    assert list(figures["ways"]) == list(memory.WAYS)
    ways = figures["ways"]
    for row in ways.values():
        assert 0 < row["held"] < row["own"] <= row["peak"]
        assert row["s"] > 0
    assert ways["server, whole"]["held"] == ways["server, files"]["held"]
    assert ways["server, whole"]["sent"] == ways["server, files"]["sent"]
    assert ways["owner, bytes"]["held"] == ways["owner, mapped"]["held"]
    assert ways["emulator, whole"]["held"] == ways["emulator, files"]["held"]
    assert "bottom sent" in console.export_text()


@pytest.mark.parametrize(
    ("change", "told"), [({"k": 3}, "k=3: must be in 1..2"), ({"width": 100}, "width=100")]
)
def test_bad_numbers_are_refused(change: dict[str, int], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        memory.run(Console(), None, **({"layers": 3, "width": 128, "k": 1} | change))  # type: ignore[arg-type]
