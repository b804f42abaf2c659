"""``fedsplit inspect``: what each side of a split would hold."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

console = Console()


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command()(inspect)


def inspect(
    model: Annotated[str, typer.Argument(help="hub name, folder, or package:NAME")],
    k: Annotated[int, typer.Option(help="blocks in the bottom; 0 = embeddings only")] = 0,
    task: Annotated[
        str, typer.Option(help="sequence-classification or causal-lm")
    ] = "sequence-classification",
    labels: Annotated[int, typer.Option(help="classes of a classifier")] = 2,
) -> None:
    """Split a model and say what each side would hold, and what an eta means for it."""
    from fedsplit.models import load, split
    from fedsplit.models.bundle.bottom import pack_bottom

    loaded = load(model, task, num_labels=labels if task != "causal-lm" else None)
    bottom, top = split(loaded.model, k)
    bundle = pack_bottom(bottom, loaded.tokenizer)
    table = Table("", "data owner: bottom", "model owner: top", title=f"{model}, split at k = {k}")
    table.add_row("blocks", _blocks(0, k), _blocks(k, k + _count(top)))
    table.add_row("parameters", f"{_parameters(bottom):,}", f"{_parameters(top):,}")
    shipped = sum(len(b) for b in bundle.files.values())
    table.add_row("shipped", f"{shipped / 1e6:.1f} MB, once", "nothing")
    table.add_row("width", str(bottom.hidden_size), str(top.hidden_size))
    console.print(table)
    console.print(_noise_table(bottom))
    console.print("the law held on a padded batch: bottom then top equals the whole model")


def _noise_table(bottom: Any) -> Table:
    """Return what common noise ratios are in eta, for this bottom's output."""
    from fedsplit.privacy import eta_from_ratio, representation_norm

    norm = representation_norm(bottom, bottom.vocab)
    table = Table(
        "noise ratio E||n|| / median ||h||",
        "eta",
        title=f"d_chi noise on this bottom's output (median norm {norm:.2f})",
    )
    for ratio in (0.5, 1.0, 2.0, 4.0, 8.0):
        table.add_row(f"{ratio:g}", f"{eta_from_ratio(ratio, bottom.hidden_size, norm):.3g}")
    return table


def _blocks(first: int, end: int) -> str:
    return "none (embeddings only)" if end <= first else f"{first} to {end - 1}"


def _count(top: Any) -> int:
    from fedsplit.models import probe

    return probe(top.model).num_layers


def _parameters(half: Any) -> int:
    return sum(p.numel() for p in half.parameters())
