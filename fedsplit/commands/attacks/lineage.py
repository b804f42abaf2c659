"""``fedsplit attack lineage``: what a thief can do to a model's weights, and which fingerprint
notices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from fedsplit.commands.options import JsonFile, table_of, write_json
from fedsplit.observe.console import console

if TYPE_CHECKING:
    from torch import nn

PRUNED = "pruning 30 %"


def register(app: typer.Typer) -> None:
    """Add the command to a group."""
    app.command("lineage")(attack_lineage)


def attack_lineage(
    model: Annotated[str, typer.Argument(help="folder, package:NAME or hub name")],
    only: Annotated[
        list[str] | None, typer.Option(help="only this map (repeatable); default all")
    ] = None,
    seed: Annotated[int, typer.Option(help="of the random maps")] = 0,
    json_: JsonFile = None,
) -> None:
    """Apply every map that keeps the model's function, and show every fingerprint after it.

    Each map first proves that the outputs stay (largest difference over the outputs' standard
    deviation); one that the family does not have is listed with the reason.
    """
    from fedsplit.commands.models import load_running
    from fedsplit.errors import UnsupportedModelError
    from fedsplit.fingerprints.evasion.transforms import TRANSFORMS, transform
    from fedsplit.registry import pick

    for name in only or []:
        if name != PRUNED:
            pick(TRANSFORMS, name, "transform")
    base = load_running(model)
    rows: list[dict[str, Any]] = [{"map": "(before)", "difference": 0.0, **measured(base, base)}]
    reasons: dict[str, str] = {}
    with console.status("applying maps ..."):
        for name in TRANSFORMS if not only else [n for n in only if n != PRUNED]:
            try:
                changed = transform(base, name, seed)
            except UnsupportedModelError as error:
                reasons[name] = str(error)
                continue
            row = {"map": name, "difference": changed.difference}
            rows.append(row | measured(base, changed.model))
        if not only or PRUNED in only:
            rows.append(pruned(base))
    console.print(_table(rows, model))
    for name, reason in reasons.items():
        console.print(f"{name}: not for this family ({reason})", highlight=False)
    kept = [r for r in rows[1:] if r["map"] != PRUNED]
    if kept:
        worst = min(float(r["score"]) for r in kept)
        console.print(
            f"{len(kept)} maps that keep the function: the score stays at {worst:.4f} or more",
            highlight=False,
        )
    write_json(json_, {"model": model, "rows": rows, "reasons": reasons})


def measured(base: nn.Module, suspect: nn.Module) -> dict[str, float | None]:
    """Return every fingerprint of two live models; None where it cannot be taken."""
    from fedsplit.errors import LineageError
    from fedsplit.fingerprints import FINGERPRINTS, WeightView

    views = WeightView.of_module(base), WeightView.of_module(suspect)
    found: dict[str, float | None] = {}
    for name, fingerprint in FINGERPRINTS.items():
        try:
            found[name] = fingerprint().compare(*views).value
        except LineageError:
            found[name] = None
    return found


def pruned(base: nn.Module) -> dict[str, Any]:
    """Return the row of a change that does not keep the function: the smallest 30 % zeroed."""
    import copy

    from fedsplit.fingerprints.evasion.editor import Editor
    from fedsplit.fingerprints.evasion.transforms import difference, outputs, pruning
    from fedsplit.seeding import torch_generator

    changed = copy.deepcopy(base)
    before = outputs(base)
    pruning(Editor(changed), torch_generator(0, "evasion", "pruning"))
    row: dict[str, Any] = {"map": PRUNED, "difference": difference(before, outputs(changed))}
    return row | measured(base, changed)


def _table(rows: list[dict[str, Any]], model: str) -> Table:
    from fedsplit.fingerprints import FINGERPRINTS

    title = f"{model}: the function stays, do the fingerprints?"
    table = table_of("map", "output moved by", *FINGERPRINTS, left=("map",), title=title)
    for row in rows:
        values = [row[name] for name in FINGERPRINTS]
        cells = [Text("-") if v is None else _coloured(float(v)) for v in values]
        table.add_row(str(row["map"]), f"{row['difference']:.1e}", *cells)
    return table


def _coloured(value: float) -> Text:
    return Text(f"{value:.4f}", "" if value >= 0.999 else "yellow")
