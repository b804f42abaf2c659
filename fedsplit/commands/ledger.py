"""``fedsplit ledger``: what has left this machine, and whether the record is whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from fedsplit.commands.options import Home, owner_home
from fedsplit.observe.console import console

if TYPE_CHECKING:
    from fedsplit.owners.ledger.totals import Totals

ledger_app = typer.Typer(no_args_is_help=True, help="The record of everything that left.")


def register(app: typer.Typer) -> None:
    """Add the group of commands to ``app``."""
    app.add_typer(ledger_app, name="ledger")


@ledger_app.command()
def show(
    home: Home = None,
    run: Annotated[str, typer.Option(help="only this run")] = "",
    tail: Annotated[int, typer.Option(help="also the last so many lines", min=0)] = 0,
) -> None:
    """Add up what left: by kind, and how many noises of each text."""
    from collections import deque

    from fedsplit.errors import LedgerError
    from fedsplit.owners.ledger.chain import NO_LINE, read_ledger
    from fedsplit.owners.ledger.totals import Totals

    totals = Totals()
    last: deque[dict[str, Any]] = deque(maxlen=tail)
    for entry in read_ledger(owner_home(home)):
        if run and str(entry.get("run", "")) != run:
            continue
        try:
            totals.apply(entry)
        except NO_LINE as error:
            what = f"{type(error).__name__} {error}"
            raise LedgerError(f"line {entry['n'] + 1}: no ledger's values: {what}") from None
        last.append(entry)
    console.print(_kinds(totals, run))
    if totals.runs and not run:
        console.print(_runs(totals))
    for line in _spent(totals):
        console.print(line, highlight=False)
    if totals.measured and not run:
        console.print(_measured(totals))
    exposed = totals.exposure.representations()
    if exposed:
        console.print(_exposure(totals))
        console.print(_most_exposed(totals))
    if last:
        console.print(_lines(list(last)))


@ledger_app.command()
def verify(home: Home = None) -> None:
    """Check every line against the one before it; names the first bad line."""
    from fedsplit.owners.ledger.chain import GENESIS, last_hash, read_ledger

    count, last = 0, ""
    for entry in read_ledger(owner_home(home)):
        count += 1
        last = str(entry.get("time", "?"))
    head = last_hash(owner_home(home)) or GENESIS
    console.print(f"whole: {count} lines, the last of {last or 'never'}", highlight=False)
    console.print(f"hash after the last line: {head}", highlight=False)


def _kinds(totals: Totals, run: str) -> Table:
    title = f"what left in run {run}" if run else "what left"
    table = Table("kind", "lines", "bytes", title=title)
    for kind, (count, size) in sorted(totals.kinds.items(), key=lambda item: -item[1][1]):
        table.add_row(kind, f"{count:,}", f"{size:,}")
    table.add_row("all", f"{sum(n for n, _ in totals.kinds.values()):,}", f"{totals.bytes:,}")
    return table


def _runs(totals: Totals) -> Table:
    table = Table("run", "sessions", "passes", "bytes", "tokens with reduced noise")
    for name, row in totals.runs.items():
        sent = sum(row.tokens.values())
        share = f"{100 * sum(row.touched.values()) / sent:.2f} %" if sent else "-"
        passes = ", ".join(f"{mode} {count:.2f}" for mode, count in row.passes.items()) or "-"
        table.add_row(name or "-", str(row.sessions), passes, f"{row.bytes:,}", share)
    return table


def _spent(totals: Totals) -> list[str]:
    """Say what trained weights and reports have cost, over all the runs shown."""
    from fedsplit.errors import ConfigError
    from fedsplit.owners.ledger.spending import DELTA

    found, training, reports = [], totals.training, totals.reports
    if training.sessions:
        text = f"weights trained here left after {training.sessions} sessions"
        text += f", {training.exact} of them without DP-SGD" if training.exact else ""
        if training.noise:
            steps = sum(training.noise.values())
            try:
                spent = f"epsilon {training.epsilon(DELTA):.4g} at delta {DELTA:g}"
            except ConfigError as error:  # Opacus is not installed
                spent = str(error)
            text += f"; DP-SGD over {steps:,} noisy steps: {spent}"
        found.append(text)
    if reports.days:
        noisy = f", noise of {reports.epsilon:.4g} nats in all" if reports.epsilon else ""
        exact = f", {reports.exact} of them exact" if reports.exact else ""
        found.append(f"averages left in {sum(reports.days.values())} reports{exact}{noisy}")
    return found


def _measured(totals: Totals) -> Table:
    from fedsplit.owners.measuring import Figures

    table = Table("rule", "what your own attackers read", title="measured before anything left")
    for content in totals.measured.values():
        figures = Figures.from_json(content)
        table.add_row(figures.rule, str(figures))
    return table


def _exposure(totals: Totals) -> Table:
    table = Table(
        "bottom and split point",
        "samples",
        "views: most, median",
        "adds up to: most, median",
        title="different noises of one text that left (same noise again counts once)",
    )
    for representation in totals.exposure.representations():
        row = totals.exposure.summary(representation)
        cost = [
            f"{unit} {row[unit]['max']:.4g}, {row[unit]['median']:.4g}"
            for unit in ("eta", "epsilon", "nats")
            if unit in row
        ]
        cost += ["no guarantee"] * ("guarantee" in row)
        digest, _, k = representation.rpartition(":")
        table.add_row(
            f"{digest[:12]}... k={k}",
            str(row["samples"]),
            f"{row['views']['max']}, {row['views']['median']}",
            "; ".join(cost),
        )
    return table


def _most_exposed(totals: Totals) -> Table:
    table = Table(
        "text (keyed name)", "views", "bottoms", "adds up to", title="texts with the most views"
    )
    for row in totals.exposure.most_exposed(10):
        cost = [f"{unit} {amount:.4g}" for unit, amount in row.cost.items() if unit != "none"]
        cost += ["no guarantee"] * ("none" in row.cost)
        table.add_row(row.name, str(row.views), str(row.bottoms), "; ".join(cost))
    return table


def _lines(entries: list[dict[str, Any]]) -> Table:
    table = Table("line", "time", "run", "round", "kind", "shape", "bytes", "digest")
    for entry in entries:
        shape = "x".join(str(x) for x in entry.get("shape", [])) or "-"
        table.add_row(
            str(entry["n"] + 1),
            str(entry["time"]),
            str(entry.get("run", "-")),
            f"{entry.get('mode', '-')} {entry.get('round', '')}".strip(),
            str(entry["kind"]),
            shape,
            f"{entry.get('bytes', 0):,}",
            str(entry.get("digest", "-"))[:12],
        )
    return table
