"""``fedsplit inspect``: what each side of a split would hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from fedsplit.errors import FedsplitError
from fedsplit.observe.console import console

if TYPE_CHECKING:
    from fedsplit.privacy import Mechanism
    from fedsplit.privacy.mechanisms.calibration import CalibrationInputs


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command()(inspect)


def inspect(
    model: Annotated[str, typer.Argument(help="hub name, folder, .gguf, or package:NAME")],
    k: Annotated[int, typer.Option(help="blocks in the bottom; 0 = embeddings only")] = 0,
    task: Annotated[
        str, typer.Option(help="such as sequence-classification or causal-lm")
    ] = "sequence-classification",
    labels: Annotated[int, typer.Option(help="classes of a classifier")] = 2,
) -> None:
    """Split a model and say what each side would hold, and what noise levels mean for it."""
    from fedsplit.models import load, split
    from fedsplit.models.bundle.bottom import pack_bottom
    from fedsplit.tasks import task_type

    loaded = load(model, task, num_labels=task_type(task).outputs_of(labels))
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
    console.print("equivalence check passed: on a padded batch, bottom then top equals the model")


def _noise_table(bottom: Any) -> Table:
    """Return every mechanism's level at common noise ratios, for this bottom's output."""
    from fedsplit.config import PrivacyConfig
    from fedsplit.privacy import MECHANISMS
    from fedsplit.privacy.mechanisms.calibration import CalibrationInputs

    inputs = CalibrationInputs(PrivacyConfig(), bottom, bottom.vocab)
    noisy = {name: m for name, m in MECHANISMS.items() if m.level is not None}
    table = Table(
        "noise ratio",
        *(f"{name} {m.level.setting}" for name, m in noisy.items() if m.level is not None),
        title=f"noise ratio E||n|| / median ||h|| ({inputs.norms.median:.2f} here), levels with it",
    )
    for ratio in (0.5, 1.0, 2.0, 4.0, 8.0):
        table.add_row(f"{ratio:g}", *(_level(m, ratio, inputs) for m in noisy.values()))
    return table


def _level(mechanism: type[Mechanism], ratio: float, inputs: CalibrationInputs) -> str:
    """Return a mechanism's level at a noise ratio, or ``-`` where it has none there."""
    try:
        return f"{mechanism.level_at(ratio, inputs):.3g}"
    except FedsplitError:
        return "-"


def _blocks(first: int, end: int) -> str:
    return "none (embeddings only)" if end <= first else f"{first} to {end - 1}"


def _count(top: Any) -> int:
    from fedsplit.models import probe

    return probe(top.model).num_layers


def _parameters(half: Any) -> int:
    return sum(p.numel() for p in half.parameters())
