"""``fedsplit attack``: what a transcript gives away, measured on one's own machine.

``attack_app`` is the group; a module with another attack command adds it there in its own
``register``.
"""

from __future__ import annotations

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
    """List the attacks and what each is given."""
    from fedsplit.attacks import ATTACKS

    table = Table("attack", "knowledge")
    for name, attack in sorted(ATTACKS.items()):
        knowledge = attack.knowledge
        table.add_row(name, knowledge if isinstance(knowledge, str) else "depends on its settings")
    console.print(table)
