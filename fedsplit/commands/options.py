"""Options, files and tables that several commands share."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from fedsplit import storage
from fedsplit.errors import ConfigError


def check_output(option: str, path: Path | None, suffixes: tuple[str, ...] = ()) -> None:
    """Refuse a file that could not be written, before what is to be in it has cost anything.

    Args:
        option: that names it.
        path: of the file, whose missing folders will be made; None: nothing is asked for.
        suffixes: of which its name must have one; empty: any.

    Raises:
        ConfigError: another suffix, a folder, or a place where nothing can be written.
    """
    if path is None:
        return
    if suffixes and path.suffix not in suffixes:
        raise ConfigError(f"{option} {path}: must end with {' or '.join(suffixes)}")
    if path.is_dir():
        raise ConfigError(f"{option} {path}: must be a file, is a folder")
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"{option} {path}: cannot be written: {there} is no writable folder")


def _writable_json(path: Path | None) -> Path | None:
    check_output("--json", path)
    return path


JsonFile = Annotated[
    Path | None,
    typer.Option("--json", help="also write the figures", callback=_writable_json),
]
Home = Annotated[
    Path | None, typer.Option(help="the owner's home; default: $FEDSPLIT_HOME or ~/.fedsplit")
]
Generator = Annotated[
    Path | None, typer.Option(help="ONNX generator of the pictures instead of the dogs")
]


def owner_home(home: Path | None) -> Path:
    """Return the owner's home as an owner command finds it."""
    return home or Path(os.environ.get("FEDSPLIT_HOME") or Path.home() / ".fedsplit")


def write_json(path: Path | None, content: Any, indent: int = 1) -> None:
    """Write the figures of a command where ``--json`` asks for them.

    Raises:
        ConfigError: the file cannot be written.
    """
    if path is None:
        return
    text = json.dumps(content, indent=indent, allow_nan=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--json {path}: cannot be written: {error}") from None


def write_template(path: Path, template: Path, what: str) -> None:
    """Copy a commented file that an owner fills in, readable by the owner alone.

    Raises:
        ConfigError: the file is there already, or cannot be written.
    """
    try:
        storage.create(path, template.read_bytes(), storage.PRIVATE)
    except OSError as error:
        raise ConfigError(f"{what} {path}: must be a new file: {error}") from None


def table_of(*columns: str, left: tuple[str, ...], title: str | None = None) -> Table:
    """Return a table whose columns are numbers, to the right, but for those in ``left``."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right")
    return table
