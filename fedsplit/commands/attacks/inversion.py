"""``fedsplit attack``: what a transcript gives away, measured on one's own machine.

``attack_app`` is the group; a module with another attack command adds it there in its own
``register``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

console = Console()
attack_app = typer.Typer(
    no_args_is_help=True, help="Attacks on recorded transcripts, each scored with an interval."
)


def register(app: typer.Typer) -> None:
    """Add the group to ``app``."""
    app.add_typer(attack_app, name="attack")


@attack_app.command("list")
def list_() -> None:
    """List the attacks, what each is given, and what its budget is."""
    from fedsplit.attacks import ATTACKS

    table = Table("attack", "knowledge", "budget")
    for name, attack in sorted(ATTACKS.items()):
        known = attack.knowledge if isinstance(attack.knowledge, str) else attack().knowledge
        table.add_row(name, known, ", ".join(attack.budget) or "none")
    console.print(table)


@attack_app.command("inversion")
def inversion(
    transcript: Annotated[
        Path, typer.Argument(help="a run's folder, or its server/transcript.safetensors")
    ],
    model: Annotated[str, typer.Option(help="the initial model; default: the run's")] = "",
    truth: Annotated[
        Path | None, typer.Option(help="truth.safetensors; default: beside the transcript")
    ] = None,
    attack: Annotated[
        list[str] | None, typer.Option(help="repeatable; default: those that fit the split")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="a run setting: privacy.eta=8, split.k=2 ...; repeatable"),
    ] = None,
    public: Annotated[
        str, typer.Option(help="the attacker's text, one per line; default: what Python ships")
    ] = "",
    samples: Annotated[int, typer.Option(help="samples attacked")] = 400,
    budget: Annotated[
        list[str] | None,
        typer.Option(help="KEY=N, repeatable: optimisation-steps, learned-steps, shortlist ..."),
    ] = None,
    seed: Annotated[int, typer.Option(help="of the samples and the attackers")] = 0,
    json_: Annotated[Path | None, typer.Option("--json", help="also write the results")] = None,
) -> None:
    """Read texts out of what a server received, and score the guesses against the truth.

    A run's folder says by itself which model, split and mechanism it had; any setting can be given
    or changed with --set, which is how an attacker's wrong belief about the noise is measured.
    """
    import json

    from fedsplit.attacks.inversion.files import attack_files, parse_budget

    results = attack_files(
        transcript,
        settings=[*(set_ or []), *([f"model.name={model}"] if model else [])],
        truth=truth,
        attacks=attack or [],
        public=public,
        samples=samples,
        budget=parse_budget(budget or []),
        seed=seed,
    )
    console.print(result_table(results))
    if json_ is not None:
        text = json.dumps([r.to_dict() for r in results], indent=2, allow_nan=False)
        json_.write_text(text + "\n", encoding="utf-8")


def result_table(results: list[Any]) -> Table:
    """Return attack results as a table, one row each."""
    table = Table(title="What each attacker recovers (95 % intervals over samples)")
    for column in ("attack", "success", "interval", "privacy", "top 10", "guessing", "tokens"):
        table.add_column(column, justify="left" if column == "attack" else "right")
    table.add_column("seconds", justify="right")
    table.add_column("knowledge")
    for r in results:
        low, high = r.interval
        table.add_row(
            r.name,
            f"{100 * r.success:.1f} %",
            f"{100 * low:.1f} to {100 * high:.1f}",
            f"{100 * r.empirical_privacy:.1f} %",
            "" if r.top10 is None else f"{100 * r.top10:.1f} %",
            f"{100 * r.baseline:.1f} %",
            str(r.tokens),
            f"{r.seconds:.1f}",
            r.knowledge,
        )
    return table
