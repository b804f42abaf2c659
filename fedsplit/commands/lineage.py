"""``fedsplit lineage``: the evidence of a run, its keys, and the portraits' encoder."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from fedsplit.commands.options import Generator, table_of
from fedsplit.observe.console import console

if TYPE_CHECKING:
    from fedsplit.fingerprints.evidence.chain import Record
    from fedsplit.fingerprints.portraits.sheet import Column

lineage_app = typer.Typer(
    no_args_is_help=True, help="Evidence that a run's models descend from its base."
)
CHAIN = "lineage.jsonl"
SHOWN = 5
Signer = Annotated[
    str | None, typer.Option(help="public key (hex or file) that must have signed it")
]
COLOURS = {"in_lineage": "green", "not_shown": "yellow", "independent": "red"}


def register(app: typer.Typer) -> None:
    """Add the group to ``app``."""
    app.add_typer(lineage_app, name="lineage")


@lineage_app.command()
def show(
    run: Annotated[Path, typer.Argument(help="a run's folder, or its lineage.jsonl")],
    key: Signer = None,
    picture: Annotated[
        Path | None, typer.Option(help="the sheet of portraits; default lineage.png beside it")
    ] = None,
    generator: Generator = None,
) -> None:
    """Print what was found round by round, and draw the base with its descendants."""
    from fedsplit.fingerprints.evidence.chain import read
    from fedsplit.fingerprints.evidence.keys import read_public

    chain = find_chain(run)
    records = list(read(chain, signer=None if key is None else read_public(key)))
    console.print(rounds(records, chain))
    for line in remarks(records):
        console.print(line, highlight=False)
    columns = portraits(records)
    if columns:
        from fedsplit.commands.models import painter
        from fedsplit.fingerprints.portraits.sheet import draw_sheet

        where = picture or chain.with_name("lineage.png")
        draw_sheet(columns, where, size=128, painter=painter(generator))
        console.print(f"portraits: {where}", highlight=False)


@lineage_app.command()
def verify(
    chain: Annotated[Path, typer.Argument(help="a lineage.jsonl, or the folder that has one")],
    key: Signer = None,
    head: Annotated[
        str | None, typer.Option(help="hash that the last record must have: is the end there?")
    ] = None,
) -> None:
    """Check every record's hash, signature and place offline; exit code 1 names the broken line."""
    from fedsplit.fingerprints.evidence.chain import read
    from fedsplit.fingerprints.evidence.chain import verify as verify_chain
    from fedsplit.fingerprints.evidence.keys import read_public

    where = find_chain(chain)
    signer = None if key is None else read_public(key)
    count = verify_chain(where, signer=signer, head=head)
    newest = deque(read(where, signer=signer), maxlen=1)
    if not newest:
        console.print("no records: nothing was shown and nothing is wrong")
        return
    last = newest[0]
    console.print(Text("intact:", "green"), f"{count} records, rounds up to {last.round}")
    console.print(f"signed by {last.body['signer']}", highlight=False)
    console.print(f"head      {last.hash}", highlight=False)
    if signer is None:
        console.print("the key was taken from the chain itself: give --key to know whose it is")


@lineage_app.command("key")
def key_(
    path: Annotated[Path, typer.Argument(help="the private key's file; its public half is beside")],
) -> None:
    """Make an Ed25519 key to sign fingerprints and evidence with."""
    from fedsplit.fingerprints.evidence.keys import create_key, public_hex, public_path

    made = create_key(path)
    console.print(f"private key {path} (mode 0600; keep it), public key {public_path(path)}")
    console.print(public_hex(made), highlight=False)


@lineage_app.command("train-encoder")
def train_encoder(
    out: Annotated[Path, typer.Option(help="the weights")] = Path("encoder.safetensors"),
    seed: Annotated[int, typer.Option(help="of everything that is drawn")] = 2312,
    steps: Annotated[int, typer.Option(help="of Adam")] = 400,
) -> None:
    """Train the portraits' encoder from nothing, on synthetic matrices only, as the shipped one."""
    import torch

    from fedsplit.commands.models import write_file
    from fedsplit.fingerprints.portraits import encoder
    from fedsplit.fingerprints.portraits import encoder_checks as training

    config = encoder.EncoderConfig(seed=seed, steps=steps)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order: the same seed gives the same weights
    try:
        made = encoder.train_encoder(
            config,
            report=lambda step, loss, near, far: console.print(
                f"step {step:4d}  loss {loss:.3f}  relatives {near:.3f}  strangers {far:.3f}",
                highlight=False,
            ),
        )
    finally:
        torch.set_num_threads(threads)
    write_file(out, lambda path: encoder.save(made, path, config))
    kept = encoder.load(out)
    found = training.held_out(kept, config)
    console.print(
        f"{found.samples} fresh matrices: noisy copies agree by {found.near:.3f} (least "
        f"{found.near_least:.3f}), strangers by {found.far:.3f} (most {found.far_most:.3f})",
        highlight=False,
    )
    console.print(f"written to {out} ({out.stat().st_size / 1e6:.1f} MB), seed {seed}")
    if training.recipe(encoder.SHIPPED) == training.recipe(out):
        moved = training.largest_difference(kept, encoder.load())
        console.print(f"largest difference from the shipped weights: {moved:.1e}", highlight=False)


def find_chain(run: Path) -> Path:
    """The evidence of a run: the file itself, or the one in a run's folder or just below it.

    Raises:
        LineageError: if there is none, or several.
    """
    from fedsplit.errors import LineageError

    if not run.is_dir():
        return run
    found = [run / CHAIN] if (run / CHAIN).is_file() else sorted(run.glob(f"*/{CHAIN}"))
    if len(found) > 1:
        raise LineageError(f"{run}: holds {len(found)} chains, such as {found[0]}: name one")
    if not found:
        raise LineageError(f"{run}: holds no {CHAIN} (was lineage.gate off, or output.dir empty?)")
    return found[0]


def rounds(records: list[Record], chain: Path) -> Table:
    """One line per record."""
    title = f"{chain}: {len(records)} records, each signed"
    columns = ("round", "verdict", "score", "worst block", "pcs", "ics", "action", "owners")
    table = table_of(*columns, left=("verdict", "action"), title=title)
    for record in records:
        report = record.body["report"]
        layers = report.get("per_layer") or []
        worst = min(range(len(layers)), key=layers.__getitem__) if layers else None
        details = record.body.get("details") or {}
        owners = details.get("owners") or {}
        good = sum(1 for row in owners.values() if row.get("action") == "accept")
        verdict = record.verdict.replace("_", " ")
        table.add_row(
            str(record.round),
            Text(verdict, COLOURS.get(record.verdict, "")),
            figure(report.get("score")),
            "-" if worst is None else f"{layers[worst]:.4f} ({worst})",
            figure(report.get("pcs")),
            figure(report.get("ics")),
            str(record.body["action"]),
            f"{good} of {len(owners)} accepted" if owners else "-",
        )
    return table


def remarks(records: list[Record]) -> list[str]:
    """Who was quarantined or set aside, and what could not be judged."""
    lines: list[str] = []
    for record in records:
        details = record.body.get("details") or {}
        for name, row in (details.get("owners") or {}).items():
            if row.get("action") not in (None, "accept"):
                lines.append(f"round {record.round}: {name}: {row['action']}: {row.get('reason')}")
        if details.get("named"):
            lines.append(f"round {record.round}: leave-one-out names {details['named']}")
        for name in ("note", "error"):
            text = f"{name}: {details[name]}" if details.get(name) else ""
            if text and text not in lines:
                lines.append(text)
    return lines


def portraits(records: list[Record]) -> list[Column]:
    """The base with some rounds under it, then each owner whose update was refused."""
    from fedsplit.fingerprints.portraits.round_portrait import unpack_vector

    seen: list[tuple[str, Any]] = []
    base: Any = None
    refused: list[Column] = []
    for record in records:
        drawn = (record.body.get("details") or {}).get("portraits") or {}
        if base is None and "base" in drawn:
            base = unpack_vector(drawn["base"])
        if "aggregate" in drawn:
            seen.append((f"round {record.round}", unpack_vector(drawn["aggregate"])))
        for name, text in (drawn.get("owners") or {}).items():
            if str(name) not in {title for title, _ in refused} and len(refused) < SHOWN:
                label = f"refused, round {record.round}"
                refused.append((str(name), [(label, unpack_vector(text))]))
    if base is None:
        return []
    keep = sorted({round(i * (len(seen) - 1) / (SHOWN - 1)) for i in range(SHOWN)}) if seen else []
    return [("run", [("base", base), *(seen[i] for i in keep)]), *refused]


def figure(value: Any) -> str:
    """A number of the table."""
    return f"{value:.4f}" if isinstance(value, (int, float)) else "-"
