"""``fedsplit owner``: a data owner's machine, which runs only the app that its owner reviewed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedsplit.commands.doctor import table
from fedsplit.commands.options import write_template
from fedsplit.errors import RunError
from fedsplit.observe.console import console

if TYPE_CHECKING:
    pass

owner_app = typer.Typer(no_args_is_help=True, help="A data owner's machine.")

Node = Annotated[Path, typer.Option(help="the machine's file")]
Rules = Annotated[Path, typer.Option("--policy", help="the owner's policy")]


def register(app: typer.Typer) -> None:
    """Add the group of commands to ``app``."""
    app.add_typer(owner_app, name="owner")


@owner_app.command()
def init(
    path: Annotated[Path, typer.Argument(help="file to write")] = Path("node.toml"),
) -> None:
    """Write a commented node.toml, to be read and changed."""
    from fedsplit.deploy.node import TEMPLATE

    write_template(path, TEMPLATE, "node file")
    console.print(f"wrote {path}; when it is filled in: fedsplit owner check", highlight=False)


@owner_app.command()
def digest(
    app_path: Annotated[
        Path,
        typer.Argument(metavar="APP_DIR|FAB", help="a bundle (.fab), or an app's folder"),
    ],
    explain: Annotated[bool, typer.Option(help="also say what the app brings")] = False,
) -> None:
    """Print the digest of a Flower app, for app.digest in a policy; a source folder is bundled."""
    from fedsplit.deploy.review import bundle_of, facts_of
    from fedsplit.owners.app_digest import digest_of_bundle

    bundle = bundle_of(app_path)
    if explain:
        for line in facts_of(bundle):
            console.print(line, highlight=False, soft_wrap=True)
    console.print(digest_of_bundle(bundle, str(app_path)), highlight=False, soft_wrap=True)


@owner_app.command()
def identity(
    node: Node = Path("node.toml"),
) -> None:
    """Print this owner's public identity key, by which others know it in masked sums.

    They keep it as NAME.pub in the folder that offsite.peers in their policy names.
    """
    from fedsplit.deploy.node import NodeFile
    from fedsplit.owners.home import OwnerHome
    from fedsplit.owners.identity import OwnerIdentity
    from fedsplit.owners.secure_aggregation.peers import identity_of

    file = NodeFile.load(node)
    home = OwnerHome(file.home)
    found = OwnerIdentity(file.owner, home, home.secret(0, file.owner), {})
    console.print(identity_of(found), highlight=False, soft_wrap=True)


@owner_app.command()
def check(
    node: Node = Path("node.toml"),
    policy: Rules = Path("owner.toml"),
    offline: Annotated[bool, typer.Option(help="do not connect to the server")] = False,
) -> None:
    """Say whether this machine is ready: policy, authority, keys, disk, data, the way there."""
    from fedsplit.deploy.checks import FAIL, check_machine
    from fedsplit.deploy.node import NodeFile

    found = check_machine(NodeFile.load(node), policy, network=not offline)
    console.print(table(found))
    if any(x.state == FAIL for x in found):
        raise typer.Exit(1)


@owner_app.command()
def start(
    node: Node = Path("node.toml"),
    policy: Rules = Path("owner.toml"),
) -> None:
    """Run the SuperNode; an app whose digest is not the policy's never runs, and is told so."""
    from fedsplit.deploy.checks import FAIL, check_machine, reachable_or_refused
    from fedsplit.deploy.node import NodeFile
    from fedsplit.deploy.start import start as run

    file = NodeFile.load(node)
    found = check_machine(file, policy, network=False, read=False)
    bad = [x for x in found if x.state == FAIL]
    answer = None if bad else reachable_or_refused(file)
    if answer is not None and answer.state == FAIL:  # an unreachable server may come; this one not
        bad.append(answer)
    if bad:
        console.print(table(bad))
        raise RunError(f"{file.owner}: not started: {bad[0].name}: {bad[0].text}")
    if answer is not None:
        console.print(f"{file.owner}: {answer.text}", highlight=False, soft_wrap=True)
    raise typer.Exit(run(file, policy))
