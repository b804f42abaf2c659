"""One page per run: what was asked, what came out, and the pictures, in a file that needs no other.

``report.html`` lies beside ``results.json`` and is made from it; it loads nothing from anywhere.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from simulations.core.run_folder import TOP_LEVEL, read_results, write_atomically

FILE = "report.html"
TEMPLATE = Path(__file__).with_name("report.html.jinja")
MOST_ROWS = 500
MOST_PICTURE_BYTES = 8 << 20

Row = Mapping[str, Any]


def write_report(folder: Path) -> Path:
    """Write ``report.html`` from the folder's results and pictures, and return its path.

    Raises:
        RunError: no readable results, or the page cannot be written.
    """
    results = read_results(folder)
    page = render(results, sorted(folder.glob("*.png")), _text(folder / "config.toml"))
    path = folder / FILE
    write_atomically(path, page.encode())
    return path


def render(results: Mapping[str, Any], pictures: Sequence[Path], config: str = "") -> str:
    """Return the page; whatever the results hold is text in it, never markup.

    Args:
        results: the content of ``results.json``.
        pictures: PNG files to embed; one over 8 MiB is only named.
        config: the effective settings, as text.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent), autoescape=True, trim_blocks=True
    )
    environment.filters |= {"cell": _cell, "words": lambda name: str(name).replace("_", " ")}
    own = {k: v for k, v in results.items() if k not in (*TOP_LEVEL, "about")}
    return environment.get_template(TEMPLATE.name).render(
        results=results,
        machine=_machine(results["machine"]),
        pictures=[_picture(path) for path in pictures],
        sections=[(key, own[key]) for key in sorted(own, key=_position)],
        config=config,
        columns=_columns,
        tables=_tables,
        most_rows=MOST_ROWS,
    )


def _position(key: str) -> tuple[bool, bool]:
    """Return a sort key: what summarises comes first, long lists last."""
    return key not in ("summary", "utility", "privacy"), key == "rows"


def _tables(section: Mapping[str, Any]) -> Iterator[tuple[str, list[Row]]]:
    """Yield (heading, rows) of a section: its plain values first, then each nested table."""
    if plain := {k: v for k, v in section.items() if not isinstance(v, Mapping | list)}:
        yield "", _pairs(plain)
    for key, nested in section.items():
        if isinstance(nested, Mapping):
            yield str(key), _pairs(nested)


def _pairs(table: Mapping[str, Any]) -> list[Row]:
    return [{"": k, "value": v} for k, v in table.items() if not isinstance(v, Mapping)]


def _columns(rows: Sequence[Row]) -> list[str]:
    """Return the names of all values that fit into a cell."""
    return list(
        dict.fromkeys(
            name
            for row in rows
            for name, value in row.items()
            if not isinstance(value, Mapping) and not (isinstance(value, list) and len(value) > 8)
        )
    )


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(_cell(v) for v in value)
    return "" if value is None else str(value)[:400]


def _picture(path: Path) -> dict[str, str]:
    small = path.stat().st_size <= MOST_PICTURE_BYTES
    data = base64.b64encode(path.read_bytes()).decode() if small else ""
    return {"name": path.stem, "file": path.name, "data": data}


def _machine(machine: Mapping[str, Any]) -> str:
    memory = float(machine.get("memory_bytes") or 0) / 2**30
    gpus = machine.get("gpus") or []
    return f"{machine.get('cores')} cores, {memory:.0f} GiB" + (f", {gpus}" if gpus else "")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
