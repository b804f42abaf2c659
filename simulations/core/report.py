"""One page per run: what was asked, what came out, and the pictures, in a file that needs no other.

``report.html`` lies beside ``results.json`` and is made from it; it loads nothing from anywhere.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from simulations.core.run_folder import TOP_LEVEL, read_results, write_atomically

FILE = "report.html"
MOST_ROWS = 500
MOST_PICTURE_BYTES = 8 << 20

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.2rem; } .about { font-size: 1.1rem; opacity: .8; }
table { border-collapse: collapse; margin: .6rem 0; display: block; overflow-x: auto; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #8884; text-align: left; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; background: white; border-radius: 6px; }
.completed { color: #2a8a3e; } .failed, .interrupted { color: #c03a2b; }
code, pre { font: 13px/1.4 ui-monospace, monospace; } details { margin: .6rem 0; }
"""


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
    """Return the page.

    Args:
        results: the content of ``results.json``.
        pictures: PNG files to embed; one over 8 MiB is only named.
        config: the effective settings, as text.
    """
    about = html.escape(str(results.get("about", "")))
    status = html.escape(str(results["status"]))
    parts = [
        f"<h1>{html.escape(str(results['name']))}</h1>",
        f'<p class="about">{about}</p>',
        f'<p><b class="{status}">{status}</b>, {html.escape(str(results["started"]))}, '
        f"{float(results['time_s']):.0f} s; {html.escape(_machine(results['machine']))}</p>",
    ]
    if results.get("error"):
        parts.append(f"<pre>{html.escape(str(results['error']))}</pre>")
    parts += [_picture(path) for path in pictures]
    own = {k: v for k, v in results.items() if k not in (*TOP_LEVEL, "about")}
    # What summarises comes first, long lists last.
    for key in sorted(own, key=lambda k: (k not in ("summary", "utility", "privacy"), k == "rows")):
        parts.append(_section(key, own[key]))
    if config:
        parts.append(f"<h2>settings</h2><details><summary>config.toml</summary>"
                     f"<pre>{html.escape(config)}</pre></details>")  # fmt: skip
    if results.get("notes"):
        notes = "".join(f"<li>{html.escape(str(n))}</li>" for n in results["notes"][:50])
        parts.append(f"<h2>notes</h2><ul>{notes}</ul>")
    title = html.escape(str(results["name"]))
    body = "\n".join(part for part in parts if part)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head><body>{body}</body></html>\n"
    )


def _section(key: str, value: Any) -> str:
    heading = f"<h2>{html.escape(key.replace('_', ' '))}</h2>"
    if isinstance(value, Mapping):
        plain = {k: v for k, v in value.items() if not isinstance(v, Mapping | list)}
        nested = {k: v for k, v in value.items() if isinstance(v, Mapping)}
        inner = _table([{"": k, "value": v} for k, v in plain.items()]) if plain else ""
        inner += "".join(
            f"<h3>{html.escape(str(k).replace('_', ' '))}</h3>"
            + _table([{"": a, "value": b} for a, b in v.items() if not isinstance(b, Mapping)])
            for k, v in nested.items()
        )
        return heading + inner
    if isinstance(value, list) and value and all(isinstance(row, Mapping) for row in value):
        table = _table(value[:MOST_ROWS])
        more = f"<p>the first {MOST_ROWS} of {len(value)}</p>" if len(value) > MOST_ROWS else ""
        if len(value) > 25:
            table = f"<details><summary>{len(value)} rows</summary>{table}{more}</details>"
        return heading + table
    if isinstance(value, list):
        return ""
    return f"<p>{html.escape(key.replace('_', ' '))}: <b>{_cell(value)}</b></p>"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(
        dict.fromkeys(
            name
            for row in rows
            for name, value in row.items()
            if not isinstance(value, Mapping) and not (isinstance(value, list) and len(value) > 8)
        )
    )
    head = "".join(f"<th>{html.escape(str(name).replace('_', ' '))}</th>" for name in names)
    lines = []
    for row in rows:
        cells = []
        for name in names:
            value = row.get(name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            cells.append(f'<td class="{"number" if number else "text"}">{_cell(value)}</td>')
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(_cell(v) for v in value)
    return html.escape(str(value)[:400])


def _picture(path: Path) -> str:
    name = html.escape(path.stem)
    if path.stat().st_size > MOST_PICTURE_BYTES:
        return f"<p>{name}: see {html.escape(path.name)}</p>"
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<h2>{name}</h2><img alt="{name}" src="data:image/png;base64,{data}">'


def _machine(machine: Mapping[str, Any]) -> str:
    memory = float(machine.get("memory_bytes") or 0) / 2**30
    gpus = machine.get("gpus") or []
    return f"{machine.get('cores')} cores, {memory:.0f} GiB" + (f", {gpus}" if gpus else "")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
