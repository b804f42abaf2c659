"""A view of a run in a terminal, live or afterwards, from nothing but the files it writes.

It reads a run folder or a server's ``output.dir``: ``progress.json`` (the server's live page),
``server.json`` (a row per round), ``lineage.jsonl`` (the signed evidence; counted here, verified by
``fedsplit lineage verify``) and ``log.jsonl``.  Any of them may be missing, half written, damaged
or of another version: then what was read before is shown, or nothing.  Whoever can read the files
can watch; the run is not asked and does not notice.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedsplit import storage
from fedsplit.errors import RunError
from simulations.core.units import duration, size

PAGE, SERVER, EVIDENCE, LOG = "progress.json", "server.json", "lineage.jsonl", "log.jsonl"
DEEPEST = 4
MOST_BYTES = 256 << 20
_TAIL = 1 << 16
_STYLES = {
    "completed": "green",
    "finished": "green",
    "connected": "cyan",
    "in_lineage": "green",
    "failed": "red",
    "lost": "red",
    "benched": "yellow",
    "quarantined": "red",
    "independent": "red",
    "not_shown": "yellow",
}


@dataclass
class View:
    """What the files said when they were last readable.

    Attributes:
        folder: where they are.
        page: the live page.
        server: ``server.json``.
        records: lines of evidence.
        warnings: the last warnings of the log, oldest first.
        age_s: seconds since the page (or ``server.json``) was written.
    """

    folder: Path
    page: dict[str, Any] = field(default_factory=dict)
    server: dict[str, Any] = field(default_factory=dict)
    records: int = 0
    warnings: list[str] = field(default_factory=list)
    age_s: float = 0.0


def find(folder: Path) -> Path:
    """Return the folder at or below ``folder`` whose server wrote last.

    Raises:
        RunError: there is none.
    """
    newest: tuple[float, Path] | None = None
    level = [folder]
    for _ in range(DEEPEST):
        below: list[Path] = []
        for each in level:
            for name in (PAGE, SERVER):
                with suppress(OSError):
                    found = ((each / name).stat().st_mtime, each)
                    newest = max(newest, found) if newest else found
            with suppress(OSError):
                below += [path for path in sorted(each.iterdir()) if path.is_dir()]
        if newest is not None and len(level) == 1:
            break  # the folder itself was meant
        level = below
    if newest is None:
        raise RunError(f"{folder}: no {PAGE} or {SERVER} in it; is it a run's folder?")
    return newest[1]


def refresh(view: View) -> View:
    """Read the files again; what cannot be read stays as it was."""
    folder = view.folder
    view.page = _object(folder / PAGE) or view.page
    view.server = _object(folder / SERVER) or view.server
    for name in (SERVER, PAGE):
        with suppress(OSError):
            view.age_s = max(0.0, time.time() - (folder / name).stat().st_mtime)
    with suppress(OSError), (folder / EVIDENCE).open("rb") as file:
        view.records = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    view.warnings = list(_warnings(folder / LOG))[-5:] or view.warnings
    return view


def _object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; empty if there is none that can be read."""
    try:
        content = json.loads(storage.read_bounded(path, MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _warnings(path: Path) -> Iterable[str]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL))
            lines = file.read(_TAIL).splitlines()
    except OSError:
        return
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue  # the first is cut off, the last may be half written
        if isinstance(row, dict) and row.get("level") in ("WARNING", "ERROR", "CRITICAL"):
            yield f"{str(row.get('time', ''))[11:19]} {row.get('message', '')}"


# ---- drawing ------------------------------------------------------------------------------------


def draw(view: View) -> RenderableType:
    """Return the view as something that rich prints."""
    page, server = view.page, view.server
    rounds = [row for row in _list(server.get("rounds")) if isinstance(row, dict)]
    parts: list[RenderableType] = [_title(view), _position(page, rounds), _privacy(page, rounds)]
    if serving := _dict(page.get("serving") or server.get("serving")):
        told = ", ".join(f"{k} {_short(v)}" for k, v in serving.items() if _number(v) is not None)
        parts.append(Text.assemble(("serving ", "bold"), told))
    parts += [table for table in (_owners(page, rounds), _rounds(rounds)) if table is not None]
    if view.records:
        parts.append(Text.assemble(f"evidence: {view.records} signed records in {EVIDENCE}"))
    parts += [Text.assemble((clean(text, 300), "yellow")) for text in view.warnings]
    if error := server.get("error"):
        parts.append(Text.assemble((clean(error, 1000), "red")))
    return Group(*parts)


def _title(view: View) -> Text:
    page = view.page
    status = clean(view.server.get("status") or page.get("status") or "?", 20)
    if status not in ("completed", "failed") and page.get("status"):
        status = clean(page["status"], 20)
    head = " ".join(clean(page[k], 80) for k in ("strategy", "model") if page.get(k))
    return Text.assemble(
        (head or clean(view.folder, 200), "bold"),
        "  ",
        (status, _STYLES.get(status, "cyan")),
        f"  run {clean(page['run'], 24)}" if page.get("run") else "",
        f"  written {duration(view.age_s)} ago",
    )


def _position(page: Mapping[str, Any], rounds: list[dict[str, Any]]) -> RenderableType:
    if not page:
        return Text.assemble(f"{len(rounds)} rounds recorded")
    at, of = _number(page.get("round")) or 0, _number(page.get("rounds")) or 0
    step, steps = _number(page.get("step")) or 0, _number(page.get("steps")) or 0
    speed, seconds = _number(page.get("steps_per_s")), _dict(page.get("step_seconds"))
    text = Text.assemble(
        f"round {at:g} of {of:g} ",
        clean(page.get("mode", ""), 12),
        f", step {step:g} of {steps:g}" if steps else "",
        f", {speed:.2f} steps/s" if speed else "",
        "".join(
            f", {name} {1000 * value:.0f} ms"
            for name in ("p50", "p99")
            if (value := _number(seconds.get(name))) is not None
        ),
        f", up {_size(page.get('bytes_up'))}, down {_size(page.get('bytes_down'))}",
    )
    grid = Table.grid(padding=(0, 2))
    grid.add_row(ProgressBar(total=max(1.0, steps), completed=min(step, steps), width=24), text)
    return grid


def _privacy(page: Mapping[str, Any], rounds: list[dict[str, Any]]) -> Text:
    spent = _dict(page.get("privacy"))
    told = " ".join(f"{k}={_short(v)}" for k, v in spent.items() if k != "mechanism")
    train = [_dict(row.get("train")) for row in rounds]
    tokens = sum(_number(part.get("row_tokens")) or 0 for part in train)
    tokens += sum(_number(_dict(r.get("evaluate")).get("row_tokens")) or 0 for r in rounds)
    last = _dict(train[-1].get("metrics")) if train else {}
    return Text.assemble(
        ("privacy ", "bold"),
        clean(spent.get("mechanism", "?"), 40),
        f" {clean(told, 200)}" if told else "",
        f": {tokens:,.0f} tokens seen",
        "".join(
            f", {key} {value:.4g}"
            for key in ("epsilon", "share-touched")
            if (value := _number(last.get(key))) is not None
        ),
    )


def _owners(page: Mapping[str, Any], rounds: list[dict[str, Any]]) -> Table | None:
    """Return a line per owner: from the live page, or from the last round where there is none."""
    rows = {clean(r.get("name"), 40): r for r in map(_dict, _list(page.get("owners"))) if r}
    train = _dict(_dict(rounds[-1]).get("train")) if rounds else {}
    if not rows:
        rows = {clean(n, 40): {"state": "finished"} for n in _list(train.get("finished"))}
        for name, why in _dict(train.get("lost")).items():
            rows[clean(name, 40)] = {"state": "lost", "reason": why}
    if not rows:
        return None
    figures = {
        clean(name, 40): _dict(figure)
        for name, figure in _dict(_dict(train.get("metrics")).get("owners")).items()
    }
    table = Table("owner", "state", "round", "sessions", "up", "down", "loss", "why", box=None)
    for name, row in sorted(rows.items())[:200]:
        state = clean(row.get("state", "?"), 16)
        table.add_row(
            Text(name),
            Text(state, style=_STYLES.get(state, "")),
            _cell(row.get("round")),
            _cell(row.get("sessions")),
            _size(row.get("bytes_up")),
            _size(row.get("bytes_down")),
            _cell(figures.get(name, {}).get("loss")),
            Text(clean(row.get("reason", ""), 80)),
        )
    return table


def _rounds(rounds: list[dict[str, Any]]) -> Table | None:
    if not rounds:
        return None
    columns = ("round", "loss", "held-out", "accuracy", "verdict", "score", "steps", "up", "lost")
    table = Table(*columns, box=None)
    for row in rounds[-10:]:
        train, held = _dict(row.get("train")), _dict(row.get("evaluate"))
        lineage = _dict(row.get("lineage"))
        verdict = clean(lineage.get("verdict", ""), 16)
        plugged = row.get("plug_in_loss")
        table.add_row(
            _cell(row.get("round")),
            _cell(_dict(train.get("metrics")).get("loss")),
            _cell(_dict(held.get("metrics")).get("loss") if plugged is None else plugged),
            _cell(_dict(held.get("metrics")).get("accuracy")),
            Text(verdict, style=_STYLES.get(verdict, "")),
            _cell(lineage.get("score")),
            _cell(train.get("steps")),
            _size(train.get("bytes_up")),
            _cell(len(_dict(train.get("lost")))) + (" partial" if train.get("partial") else ""),
        )
    return table


def clean(value: object, longest: int) -> str:
    """Return text that a terminal takes as text: owners choose names, peers send reasons."""
    text = "".join(c if c.isprintable() else "?" for c in str(value)[: longest + 1])
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _number(value: object) -> float | None:
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if known and abs(value) < 1e18 else None  # type: ignore[arg-type]


def _cell(value: object) -> str:
    number = _number(value)
    if number is None:
        return ""
    return f"{number:.0f}" if number.is_integer() else f"{number:.4f}"


def _short(value: object) -> str:
    number = _number(value)
    return f"{number:.4g}" if number is not None else clean(value, 60)


def _size(value: object) -> str:
    number = _number(value)
    return "" if number is None else size(number)


# ---- the command --------------------------------------------------------------------------------


def watch(folder: Path, console: Console, *, once: bool = False, every_s: float = 1.0) -> None:
    """Show the run until it is over, or until Ctrl-C; once if ``once``.

    ``folder`` is a run's folder, a server's ``output.dir``, or anything above them.

    Raises:
        RunError: no server wrote anything in ``folder``.
    """
    view = refresh(View(find(folder)))
    if once:
        console.print(draw(view))
        return
    with suppress(KeyboardInterrupt), Live(console=console, refresh_per_second=4) as live:
        while True:
            live.update(draw(view))
            if view.server.get("status") in ("completed", "failed"):
                return
            time.sleep(every_s)
            with suppress(RunError):  # an experiment of several runs: the newest is shown
                if (newest := find(folder)) != view.folder:
                    view = View(newest)
            view = refresh(view)
