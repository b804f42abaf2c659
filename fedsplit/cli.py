"""The ``fedsplit`` command: what a party can ask on its own machine, without any federation."""

from __future__ import annotations

import typer

import fedsplit
from fedsplit.commands import (
    compare,
    doctor,
    export,
    fingerprint,
    inspect,
    keys,
    ledger,
    lineage,
    owner,
    plan,
    policy,
    predict,
)
from fedsplit.commands.attacks import extraction as attack_extraction
from fedsplit.commands.attacks import inversion as attack
from fedsplit.commands.attacks import lineage as attack_lineage
from fedsplit.commands.attacks import policy as attack_policy
from fedsplit.commands.evaluation import evaluate
from fedsplit.observe.console import console, run_command_line

app_cli = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app_cli.command()
def version() -> None:
    """Print the version of fedsplit; both parties of a session must have the same minor one."""
    console.print(fedsplit.__version__)


inspect.register(app_cli)
keys.register(app_cli)
ledger.register(app_cli)
owner.register(app_cli)
plan.register(app_cli)
policy.register(app_cli)
predict.register(app_cli)
attack.register(app_cli)
attack_extraction.register(attack.attack_app)
attack_lineage.register(attack.attack_app)
attack_policy.register(attack.attack_app)
compare.register(app_cli)
doctor.register(app_cli)
evaluate.register(app_cli)
export.register(app_cli)
fingerprint.register(app_cli)
lineage.register(app_cli)


def app() -> None:
    """Run the command line; errors made on purpose end with one line and exit code 1."""
    run_command_line(app_cli)
