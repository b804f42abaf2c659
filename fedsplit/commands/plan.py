"""``fedsplit plan``: what a way to tune together costs and reveals, before anything is built."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from fedsplit.commands.options import JsonFile, table_of, write_json
from fedsplit.observe.console import console

if TYPE_CHECKING:
    from fedsplit.emulators import Compressor
    from fedsplit.emulators.planning.language import Answer
    from fedsplit.emulators.planning.planner import Base, PlanRow


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command()(plan)


def plan(
    model: Annotated[str, typer.Argument(help="folder of a causal language model")],
    adapters: Annotated[
        list[int] | None, typer.Option("--adapters", help="numbers of adapter blocks to compare")
    ] = None,
    alpha: Annotated[
        list[float] | None, typer.Option("--alpha", help="ScaleOT: shares replaced by harmonizers")
    ] = None,
    beta: Annotated[
        list[float] | None, typer.Option("--beta", help="rank reductions of what remains")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="token blocks in an owner's step")] = 8,
    length: Annotated[int, typer.Option(help="tokens of a block")] = 128,
    width: Annotated[int, typer.Option(help="bytes of a parameter: 4 or 2")] = 4,
    method: Annotated[
        str, typer.Option(help="trained in A: full, lora, bottleneck, bitfit or prefix")
    ] = "full",
    rank: Annotated[int, typer.Option(help="of LoRA's updates")] = 8,
    bottleneck: Annotated[int, typer.Option(help="width of bottleneck adapters")] = 32,
    prefix: Annotated[int, typer.Option(help="trained positions of each attention")] = 8,
    task: Annotated[
        str,
        typer.Option(help="causal-lm: which of split and offsite tuning meets --floor"),
    ] = "",
    floor: Annotated[
        float, typer.Option(help="with --task: least share of tokens that nobody reads")
    ] = 0.6,
    json_: JsonFile = None,
) -> None:
    """Emulator size, owner memory, bytes per round, step cost and share of the base revealed.

    With --task causal-lm: split tuning under each protection and offsite tuning, from measured
    runs: quality, what the strongest reader leaves, bytes and compute, against an owner's floor.
    """
    from fedsplit.emulators.planning.planner import describe_base, plan_grid
    from fedsplit.errors import one_of
    from fedsplit.models.adapters.methods import MethodSettings

    inside = MethodSettings(method=method, rank=rank, width=bottleneck, prefix=prefix)
    base = describe_base(model, width, inside)
    if task:
        one_of("task", task, ("causal-lm",))
        _answer(model, base, floor, json_)
        return
    layers = base.sizes.layers
    # The counts that ask for nothing impossible: a block must be left outside A.
    counts = adapters or [n for n in (2, 4, 8) if n < layers] or [1]
    grid = _grid(layers, counts, alpha or [0.0, 0.5, 1.0], beta or [0.0, 0.5])
    rows = plan_grid(base, grid, batch_size=batch_size, length=length)
    console.print(
        f"{model}: {layers} blocks, {base.total / 1e6:,.1f} M parameters; steps of {batch_size} "
        f"blocks of {length} tokens; {method} trains {base.trained:,} parameters in a block of A"
    )
    console.print(_table(rows))
    console.print(
        "revealed: share of the base's weights that an owner gets bit for bit; owner memory is an "
        "estimate (weights, Adam, activations, logits)",
        style="dim",
    )
    write_json(json_, [asdict(row) for row in rows])


def _answer(model: str, base: Base, floor: float, json_: JsonFile) -> None:
    from fedsplit.emulators.planning.language import answers

    found = answers(base, floor)
    columns = ("data", "quality", "not read", "by gradients", "guess", "up", "owner", "meets")
    table = table_of("setting", *columns, left=("setting", "data"))
    for row in found:
        once = f" + {row.costs.round * 4 / 1e6:,.1f} MB a round" if row.costs.round else ""
        shares = (row.quality, row.privacy, row.channel, row.guess)
        table.add_row(
            row.settings,
            f"{row.data} ({row.runs})",
            *(f"{100 * share:.1f} %" for share in shares),
            f"{2 * row.costs.up:,} B a token{once}",
            f"{row.costs.flops / 1e6:,.1f} MFLOP a token",
            "yes" if row.meets else "no",
        )
    console.print(f"{model}: floor {100 * floor:g} % of tokens that nobody reads")
    console.print(table)
    console.print(_verdict(found, floor))
    console.print(
        "quality: share of the unprotected gain of one pass; not read: by the strongest reader "
        "over everything that crosses. Both were measured on another model "
        "(docs/results/lm-protection.md); costs are this model's, representations in bfloat16. "
        "With DP-SGD: not measured.",
        style="dim",
    )
    write_json(json_, [asdict(row) for row in found])


def _verdict(found: list[Answer], floor: float) -> str:
    """Return in words which strategy meets the floor."""
    said = []
    for name, mine in (
        ("split tuning", [a for a in found if not a.protection.startswith("offsite")]),
        ("offsite tuning", [a for a in found if a.protection.startswith("offsite")]),
    ):
        good = [a for a in mine if a.meets]
        if good:
            best = max(good, key=lambda a: a.quality)
            said.append(
                f"{name}: {best.settings} meets the floor with {100 * best.quality:.0f} % of the "
                f"gain ({best.data})"
            )
        elif mine:
            most = max(mine, key=lambda a: (a.privacy, a.quality))
            said.append(
                f"{name}: no measured setting meets the floor; the most that nobody reads is "
                f"{100 * most.privacy:.0f} % ({most.settings})"
            )
        else:
            said.append(f"{name}: not measured")
    return "\n".join(said)


def _grid(
    layers: int, counts: list[int], alphas: list[float], betas: list[float]
) -> dict[str, Compressor]:
    from fedsplit.emulators import COMPRESSORS

    grid: dict[str, Compressor] = {}
    for count in counts:
        for row in COMPRESSORS.values():
            grid |= row.variants(layers, count, alphas, betas)
    return grid


def _table(rows: list[PlanRow]) -> Table:
    columns = ("emulator", "sent once", "per round", "owner memory", "step", "revealed")
    table = table_of("setting", *columns, left=("setting",))
    for row in rows:
        table.add_row(
            row.name,
            f"{row.emulator_params / 1e6:,.1f} M",
            f"{row.emulator_bytes / 1e6:,.1f} MB",
            f"{row.round_bytes / 1e6:,.1f} MB",
            f"{row.owner_bytes / 2**30:,.2f} GiB",
            f"{100 * row.step_share:.0f} %",
            f"{100 * row.revealed:.0f} %",
        )
    return table
