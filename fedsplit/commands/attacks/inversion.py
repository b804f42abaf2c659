"""``fedsplit attack``: what a transcript gives away, measured on one's own machine.

``attack_app`` is the group; a module with another attack command adds it there in its own
``register``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from fedsplit.commands.options import JsonFile, table_of, write_json
from fedsplit.observe.console import console

attack_app = typer.Typer(
    no_args_is_help=True, help="Attacks on recorded transcripts, each scored with an interval."
)

InitialModel = Annotated[str, typer.Option(help="the initial model; default: the run's")]
TruthFile = Annotated[
    Path | None, typer.Option(help="truth.safetensors; default: beside what was recorded")
]
RunSettings = Annotated[
    list[str] | None,
    typer.Option("--set", help="a run setting: privacy.eta=8, split.k=2 ...; repeatable"),
]
PublicText = Annotated[
    str, typer.Option(help="the attacker's text, one per line; default: what Python ships")
]
Samples = Annotated[int, typer.Option(help="samples attacked")]
Seed = Annotated[int, typer.Option(help="of the samples and the attackers")]


def register(app: typer.Typer) -> None:
    """Add the group to ``app``."""
    app.add_typer(attack_app, name="attack")


@attack_app.command("list")
def list_() -> None:
    """List the attacks, what each is given, and what its budget is."""
    from fedsplit.attacks import ATTACKS

    table = Table("attack", "reads", "needs", "knowledge", "budget")
    for name, attack in sorted(ATTACKS.items()):
        needs, budget = ", ".join(attack.needs), ", ".join(attack.budget) or "none"
        table.add_row(name, attack.reads, needs, attack().knowledge, budget)
    console.print(table)


@attack_app.command("inversion")
def inversion(
    transcript: Annotated[
        Path, typer.Argument(help="a run's folder, or its server/transcript.safetensors")
    ],
    model: InitialModel = "",
    truth: TruthFile = None,
    attack: Annotated[
        list[str] | None, typer.Option(help="repeatable; default: those that fit the split")
    ] = None,
    set_: RunSettings = None,
    public: PublicText = "",
    samples: Samples = 400,
    budget: Annotated[
        list[str] | None,
        typer.Option(help="KEY=N, repeatable: optimisation-steps, learned-steps, shortlist ..."),
    ] = None,
    seed: Seed = 0,
    json_: JsonFile = None,
) -> None:
    """Read texts out of what a server received, and score the guesses against the truth.

    A run's folder says by itself which model, split and mechanism it had; any setting can be given
    or changed with --set, which is how an attacker's wrong belief about the noise is measured.
    """
    from fedsplit.attacks.files import attack_files, parse_budget

    results = attack_files(
        transcript,
        settings=[*(set_ or []), *([f"model.name={model}"] if model else [])],
        truth=truth,
        attacks=attack or [],
        reads="tokens",
        public=public,
        samples=samples,
        budget=parse_budget(budget or []),
        seed=seed,
    )
    report(results, json_)


@attack_app.command("run")
def run(
    name: Annotated[str, typer.Argument(help="one of `fedsplit attack list`")],
    recorded: Annotated[
        Path,
        typer.Argument(
            help="a run's folder, a transcript, an update, a tuned model's answers, or (for "
            "extraction) an emulator's folder"
        ),
    ],
    model: InitialModel = "",
    truth: TruthFile = None,
    set_: RunSettings = None,
    public: PublicText = "",
    samples: Samples = 400,
    known: Annotated[
        int, typer.Option(help="samples whose private label the attacker has been told")
    ] = 8,
    budget: Annotated[
        list[str] | None, typer.Option(help="ATTACK.FIELD=VALUE or a short name; repeatable")
    ] = None,
    seed: Seed = 0,
    json_: JsonFile = None,
) -> None:
    """Run one attack of the list on what was recorded, and score it against the truth."""
    from fedsplit.attacks import ATTACKS, make_attack
    from fedsplit.attacks.files import attack_files, parse_budget
    from fedsplit.commands.attacks.extraction import emulator_case
    from fedsplit.errors import ConfigError
    from fedsplit.registry import pick

    spent = parse_budget(budget or [])
    if "emulator" in pick(ATTACKS, name, "attack").needs:
        if not model or not public:
            raise ConfigError(f"--model, --public: must be given to the attack {name!r}")
        attack = make_attack(name, seed, spent)
        answers = bool(getattr(attack, "queries", False))
        view, true = emulator_case(recorded, model, Path(public), answers=answers)
        results = [attack.run(view, true)]
    else:
        results = attack_files(
            recorded,
            settings=[*(set_ or []), *([f"model.name={model}"] if model else [])],
            truth=truth,
            attacks=[name],
            public=public,
            samples=samples,
            known=known,
            budget=spent,
            seed=seed,
        )
    report(results, json_)


def report(results: list[Any], json_: Path | None) -> None:
    """Print attack results, and write them where asked."""
    console.print(result_table(results))
    write_json(json_, [r.to_dict() for r in results], indent=2)


def result_table(results: list[Any]) -> Table:
    """Return attack results as a table, one row each; "texts" were read without an error."""
    title = "What each attacker recovers (95 % intervals over samples)"
    columns = ("attack", "success", "interval", "privacy", "top 10", "texts", "guessing", "tokens")
    table = table_of(*columns, "seconds", "knowledge", left=("attack", "knowledge"), title=title)
    for r in results:
        low, high = r.interval
        table.add_row(
            r.name,
            f"{100 * r.success:.1f} %",
            f"{100 * low:.1f} to {100 * high:.1f}",
            f"{100 * r.empirical_privacy:.1f} %",
            "" if r.top10 is None else f"{100 * r.top10:.1f} %",
            "" if r.text_recovery is None else f"{100 * r.text_recovery:.1f} %",
            f"{100 * r.baseline:.1f} %",
            str(r.tokens),
            f"{r.seconds:.1f}",
            r.knowledge,
        )
    return table
