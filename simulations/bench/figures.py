"""How a benchmark's figures leave it: as JSON, as tables, and with the machine they are from."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def publish(
    console: Console, json_path: Path | None, figures: dict[str, Any], tables: Iterable[Table]
) -> dict[str, Any]:
    """Write the figures where asked, print their tables and the machine, and return them.

    Args:
        console: for the tables.
        json_path: where to write the figures, or None.
        figures: expressible in JSON; ``machine`` among them.
        tables: what is printed.
    """
    if json_path is not None:
        json_path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    for table in tables:
        console.print(table)
    m = figures["machine"]
    console.print(f"machine: {m['cpu']}, {m['cores']} cores, {m['memory_bytes'] / 2**30:.0f} GiB")
    return figures
