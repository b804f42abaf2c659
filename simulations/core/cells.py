"""Rows of an experiment that survive being killed: one JSON line per finished cell."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedsplit.config import RunConfig
from fedsplit.errors import RunError

Row = dict[str, Any]


class Cells:
    """Finished cells of one run folder, by key.

    A cell is found again only under the same settings: another data set, model or budget in the
    same folder starts anew.  A run's setting that a cell's version did not have is at its default.

    Args:
        path: the file, made on first use.
        settings: everything the rows depend on beside their key.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self._path = path
        self._settings = json.dumps(settings, sort_keys=True, default=str)
        mine = json.loads(self._settings)
        usual = {key: value for key, value in RunConfig().to_flat().items() if key in mine}
        self._done: dict[str, list[Row]] = {}
        self._torn = False
        if not path.exists():
            return
        text = path.read_text(encoding="utf-8")
        self._torn = bool(text) and not text.endswith("\n")  # the next line must not join it
        for line in text.splitlines():
            try:
                cell = json.loads(line)
                same = {**usual, **json.loads(cell["settings"])} == mine
            except (ValueError, KeyError, TypeError):  # the line that a killed run was writing
                continue
            if same:
                self._done[cell["key"]] = cell["rows"]

    def rows(self, key: Mapping[str, Any], make: Callable[[], list[Row]]) -> list[Row]:
        """Return the cell's rows: the finished ones, or those that ``make`` returns.

        Raises:
            RunError: if the file cannot be written.
        """
        name = json.dumps(key, sort_keys=True)
        if name not in self._done:
            made = make()
            line = json.dumps({"settings": self._settings, "key": name, "rows": made})
            try:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(f"\n{line}\n" if self._torn else f"{line}\n")
            except OSError as error:
                raise RunError(f"cannot write {self._path}: {error}") from None
            self._torn = False
            self._done[name] = made
        return self._done[name]
