"""``fedsplit keys``: certificates and keys by which a federation's parties know each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from fedsplit.observe.console import console

keys_app = typer.Typer(no_args_is_help=True, help="Certificates and keys of a federation.")

Folder = Annotated[Path, typer.Argument(help="folder of the keys")]
Days = Annotated[float, typer.Option(help="validity in days")]
Client = Annotated[
    bool, typer.Option("--client-certificates", help="also certificates for mutual TLS")
]


def register(app: typer.Typer) -> None:
    """Add the group of commands to ``app``."""
    app.add_typer(keys_app, name="keys")


@keys_app.command()
def init(
    folder: Folder,
    host: Annotated[
        list[str], typer.Option(help="name or address by which owners reach the server; repeat")
    ],
    owner: Annotated[
        list[str] | None, typer.Option(help="a data owner to make a node key for; repeat")
    ] = None,
    days: Days = 365.0,
    client_certificates: Client = False,
) -> None:
    """Make authority, server certificate and owners' node keys in a new folder."""
    from fedsplit.deploy.keys import make_keys

    owners = owner or []
    made = make_keys(folder, host, owners, days=days, client_certificates=client_certificates)
    console.print(f"wrote {made}; what is in it: fedsplit keys show {made}", highlight=False)
    for name in owners:
        console.print(f"hand {made / 'owners' / name} to {name}, secretly", highlight=False)
    console.print(f"move {made / 'ca.key'} off this machine until you renew", highlight=False)


@keys_app.command()
def add(
    folder: Folder,
    owner: Annotated[str, typer.Option(help="the new data owner")],
    days: Days = 365.0,
    client_certificates: Client = False,
) -> None:
    """Make one more owner's node key."""
    from fedsplit.deploy.keys import add_owner

    made = add_owner(folder, owner, days=days, client_certificates=client_certificates)
    console.print(f"wrote {made}: hand it to {owner}, secretly", highlight=False)


@keys_app.command()
def node(folder: Folder) -> None:
    """Make a node key pair on the owner's own machine; only node.pub is handed out."""
    from fedsplit.deploy.keys import make_node

    made = make_node(folder)
    console.print(
        f"wrote {made}; send {made / 'node.pub'} to the model owner, keep node.key", highlight=False
    )


@keys_app.command()
def renew(folder: Folder, days: Days = 365.0) -> None:
    """Issue the server's certificate anew under the same authority; owners change nothing."""
    from fedsplit.deploy.keys import renew_server

    hosts = renew_server(folder, days=days)
    console.print(
        f"renewed for {days:g} days: {', '.join(hosts)}; restart SuperLink", highlight=False
    )


@keys_app.command()
def show(folder: Folder) -> None:
    """Explain every file of a key folder; exit code 1 if one is expired, readable or foreign."""
    from fedsplit.deploy.keys import explain, fingerprint

    found = explain(folder)
    table = Table("file", "what it is", "state", title=str(folder))
    for finding in found:
        colour = "red" if finding.grave else "yellow"
        state = Text(finding.fault, colour) if finding.fault else Text("ok", "green")
        table.add_row(finding.path, finding.what, state)
    console.print(table)
    told = f"fingerprint of ca.pem (SHA-256): {fingerprint(folder)}"
    console.print(told, highlight=False, soft_wrap=True)
    if any(finding.fault and finding.grave for finding in found):
        raise typer.Exit(1)
