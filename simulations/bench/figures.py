"""What benchmarks share: options, and how figures are told: JSON, tables, their machine."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.table import Table
from typer import Option

Overrides = Annotated[list[str] | None, Option("--set", help="override: key=value, repeatable")]
JsonPath = Annotated[Path | None, Option("--json", help="also write the figures here")]


def publish(
    console: Console, json_path: Path | None, figures: dict[str, Any], tables: Iterable[Table]
) -> dict[str, Any]:
    """Write the figures (JSON) where asked, print their tables and the machine, return them."""
    if json_path is not None:
        json_path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    for table in tables:
        console.print(table)
    m = figures["machine"]
    console.print(f"machine: {m['cpu']}, {m['cores']} cores, {m['memory_bytes'] / 2**30:.0f} GiB")
    return figures
