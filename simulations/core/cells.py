"""Finished cells of an experiment, which survive being killed, and the loop that works them off."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

from rich.console import Console

from fedsplit.config import RunConfig
from fedsplit.config.records import with_defaults
from fedsplit.errors import RunError
from simulations.core.progress import RunProgress
from simulations.core.run_folder import RunFolder
from simulations.core.settings import Experiment

FILE = "cells.jsonl"
Row = dict[str, Any]
Key = Mapping[str, Any]


class CellStore:
    """Rows of the finished cells of one run folder, by key: one JSON line per cell.

    A cell is found again only under the same settings: another data set, model or budget in the
    same folder starts anew.  A run's setting that a cell's version did not have is at its default.

    Args:
        path: the file, made on first use; None: cells live as long as the store.
        settings: everything the rows depend on beside their key.
        known: cells that were found elsewhere; those in the file win.
    """

    def __init__(
        self,
        path: Path | None,
        settings: Mapping[str, Any],
        known: Iterable[tuple[Key, list[Row]]] = (),
    ) -> None:
        self.options: dict[str, Any] = {}
        self._path = path
        self._settings = json.dumps(settings, sort_keys=True, default=str)
        self._done: dict[str, list[Row]] = {_name(key): rows for key, rows in known}
        self._torn = False
        if path is not None and path.exists():
            self._read(path.read_text(encoding="utf-8"))

    @classmethod
    def open(
        cls,
        folder: RunFolder,
        config: RunConfig,
        options: Mapping[str, Any],
        selecting: Collection[str],
    ) -> Self:
        """Write a run's settings to its folder and return the store of its cells.

        The options ``selecting`` choose cells and change none; the others are the store's own.
        """
        flat = config.to_flat()
        folder.write_config({**flat, "options": options})
        same = {key: value for key, value in options.items() if key not in selecting}
        store = cls(folder.path / FILE, {**flat, **same})
        store.options = same
        return store

    def _read(self, text: str) -> None:
        mine = json.loads(self._settings)
        usual = {key: value for key, value in RunConfig().to_flat().items() if key in mine}
        self._torn = bool(text) and not text.endswith("\n")  # the next line must not join it
        for line in text.splitlines():
            try:
                cell = json.loads(line)
                if with_defaults(json.loads(cell["settings"]), usual) == mine:
                    self._done[cell["key"]] = cell["rows"]
            except (ValueError, KeyError, TypeError):  # the line that a killed run was writing
                continue

    def find(self, key: Key) -> list[Row] | None:
        """Return a finished cell's rows, or None."""
        return self._done.get(_name(key))

    def save(self, key: Key, rows: list[Row]) -> None:
        """Append a finished cell.

        Raises:
            RunError: if the file cannot be written.
        """
        line = json.dumps({"settings": self._settings, "key": _name(key), "rows": rows})
        if self._path is not None:
            try:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(f"\n{line}\n" if self._torn else f"{line}\n")
            except OSError as error:
                raise RunError(f"cannot write {self._path}: {error}") from None
        self._torn = False
        self._done[_name(key)] = rows

    def rows(self, key: Key, make: Callable[[], list[Row]]) -> list[Row]:
        """Return the cell's rows: the finished ones, or those that ``make`` returns."""
        if self.find(key) is None:
            self.save(key, make())
        return self._done[_name(key)]


def run_cells(
    experiment: Experiment,
    folder: RunFolder,
    console: Console,
    store: CellStore,
    keys: Sequence[Key],
    make: Callable[..., list[Row]],
    recorded: Callable[[list[Row]], Mapping[str, Any]] = lambda rows: {"rows": rows},
) -> list[Row]:
    """Return the rows of every cell, in the order of ``keys``.

    ``make`` is called with a key's items and returns the cell's rows.  After each cell ``folder``
    records what ``recorded`` returns for the rows so far.
    """
    rows: list[Row] = []
    with RunProgress(console) as progress:
        progress.stage(experiment.kind)
        for done, key in enumerate(keys, 1):
            rows += store.rows(key, partial(make, **key))
            folder.record(about=experiment.about, **recorded(rows))
            progress.update(done / len(keys), ", ".join(f"{k} {v}" for k, v in key.items()))
    return rows


def product(**axes: Iterable[Any]) -> list[Key]:
    """Return a key for every combination of the axes' values; the last axis changes fastest."""
    keys: list[dict[str, Any]] = [{}]
    for name, values in axes.items():
        listed = list(values)
        keys = [{**key, name: value} for key in keys for value in listed]
    return list(keys)


def _name(key: Key) -> str:
    return json.dumps(key, sort_keys=True)
