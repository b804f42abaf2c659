"""``fedsplit doctor``: what this machine has and lacks, and what to do about it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from fedsplit.commands.options import JsonFile, write_json
from fedsplit.observe.console import console

if TYPE_CHECKING:
    from fedsplit.deploy.checks import Check

COLOURS = {"ok": "green", "warn": "yellow", "fail": "red", "-": "dim"}


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command()(doctor)


def doctor(
    node: Annotated[Path | None, typer.Option(help="an owner's node.toml")] = None,
    policy: Annotated[Path, typer.Option(help="that owner's policy")] = Path("owner.toml"),
    data: Annotated[Path | None, typer.Option(help="texts: a file or a folder")] = None,
    text_column: Annotated[str, typer.Option(help="column with the text")] = "text",
    label_column: Annotated[str, typer.Option(help="column with the label; '' = none")] = "label",
    model: Annotated[str, typer.Option(help="hub name, folder, .gguf, or package:NAME")] = "",
    task: Annotated[
        str, typer.Option(help="sequence-classification or causal-lm")
    ] = "sequence-classification",
    offline: Annotated[bool, typer.Option(help="do not connect to the owner's server")] = False,
    json_path: JsonFile = None,
) -> None:
    """Look at Python, packages, ports, clock, disk, GPU, certificates, data and a model.

    Exit code 1 if anything must be mended.
    """
    from fedsplit.deploy.checks import FAIL
    from fedsplit.deploy.doctor import Patient, examine

    found = examine(
        Patient(node, policy, not offline, data, text_column, label_column, model, task)
    )
    console.print(table(found))
    write_json(json_path, [{**asdict(x), "todo": x.advice} for x in found])
    if any(x.state == FAIL for x in found):
        raise typer.Exit(1)


def table(found: list[Check]) -> Table:
    """Return a line for each finding, with what to do about it."""
    shown = Table("what", "state", "found", "what to do", show_lines=True)
    for x in found:
        state = Text(x.state, COLOURS[x.state])
        shown.add_row(x.name, state, x.text, x.advice)
    return shown
