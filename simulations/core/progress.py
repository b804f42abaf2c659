"""Showing how far a run is, from the lines that the server logs."""

from __future__ import annotations

import json
import time
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from simulations.runtime.child_processes import LogLine

MARK = "fedsplit-progress "


class RunProgress:
    """A progress bar on a terminal, plain lines now and then elsewhere.

    Use as a context manager; pass :meth:`on_line` to a federation's ``run``.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._title = ""
        self._spoke = 0.0

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description:<42}", markup=False),
                BarColumn(bar_width=30),
                TextColumn("{task.percentage:3.0f} %"),
                TimeElapsedColumn(),
                console=self.console,
            )
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def stage(self, title: str) -> None:
        """Begin a stage that :meth:`update` will report on."""
        self._title = title
        self._spoke = 0.0
        if self._bar is not None:
            if self._task is not None:
                self._bar.update(self._task, completed=1.0)
            self._task = self._bar.add_task(title, total=1.0)
        else:
            self.console.print(f"{title} ...")

    def update(self, done: float, note: str = "") -> None:
        """Say how much of the stage is done, in [0, 1]."""
        text = f"{self._title} {note}".strip()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=min(1.0, done), description=text)
        elif time.monotonic() - self._spoke > 20.0:
            self._spoke = time.monotonic()
            self.console.print(f"  {text}: {100 * done:.0f} %")

    def say(self, text: str, style: str = "") -> None:
        """Print one line that stays."""
        console = self._bar.console if self._bar is not None else self.console
        console.print(Text(text, style))

    def on_line(self, line: LogLine) -> None:
        """Follow a federated run through its server's progress lines."""
        _, mark, rest = line.text.partition(MARK)
        if not mark:
            if "left out" in line.text or "refused" in line.text:
                self.say(line.text.strip()[:200], "yellow")
            return
        try:
            row: dict[str, Any] = json.loads(rest)
        except ValueError:
            return
        if row.get("done"):
            self._round_done(row)
            return
        before = (row["round"] - 1) / row["rounds"]
        share = row["step"] / max(1, row["steps"]) / row["rounds"]
        if row["mode"] == "train":
            note = f"round {row['round']}/{row['rounds']}, {row['owners']} owners"
            self.update(before + 0.95 * share, note)

    def _round_done(self, row: dict[str, Any]) -> None:
        if row["mode"] == "train":
            loss = row["loss"]
            text = f"round {row['round']}: training loss {loss:.3f}" if loss is not None else ""
            if row.get("verdict") not in (None, "off"):
                text += f", lineage: {row['verdict'].replace('_', ' ')}"
        else:
            accuracy = row["accuracy"]
            text = f"round {row['round']}: held-out accuracy {accuracy:.3f}" if accuracy else ""
        if text:
            self.say(f"  {text}")
