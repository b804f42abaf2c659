"""``fedsplit policy``: what an owner's rules mean, and whether a run would be accepted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from fedsplit.commands.options import write_template
from fedsplit.errors import ConfigError
from fedsplit.observe.console import console

if TYPE_CHECKING:
    from fedsplit.owners.policy.rules import Policy

policy_app = typer.Typer(no_args_is_help=True, help="The owner's rules: what they let out.")


def register(app: typer.Typer) -> None:
    """Add the group of commands to ``app``."""
    app.add_typer(policy_app, name="policy")


@policy_app.command()
def check(
    path: Annotated[Path, typer.Argument(help="the policy, such as owner.toml")],
    against: Annotated[
        list[str] | None,
        typer.Option(help="a run's settings: a TOML file, or KEY=VALUE; may be repeated"),
    ] = None,
) -> None:
    """Say in words what a policy allows; with --against, whether a run would be accepted."""
    from fedsplit.owners.policy.description import undecided
    from fedsplit.owners.policy.rules import Asked, Policy

    policy = Policy.load(path)
    if against is None:
        _explain(policy, path)
        return
    flat = _settings(against)
    asked = Asked(flat, own_ca=True)
    breaches = policy.settings_breaches(asked)
    for breach in breaches:
        console.print(Text("refused", "red"), str(breach), highlight=False)
    late = undecided(policy, flat)
    late += [rule for rule in ("transport.own_ca", "app.digest") if rule in policy]
    if "model.bottoms" in policy:
        late.append("model.bottoms")
    if late:
        rest = ", ".join(dict.fromkeys(late))
        console.print(f"settings do not decide, so checked in the run: {rest}", highlight=False)
    if breaches:
        raise typer.Exit(1)
    console.print(Text.assemble(("accepted", "green"), ", as far as its settings say"))


@policy_app.command()
def init(
    path: Annotated[Path, typer.Argument(help="file to write")] = Path("owner.toml"),
) -> None:
    """Write a commented policy with strict values, to be read and changed."""
    from fedsplit.owners.policy.description import TEMPLATE

    write_template(path, TEMPLATE, "policy")
    console.print(f"wrote {path}; what it means: fedsplit policy check {path}", highlight=False)


def _explain(policy: Policy, path: Path) -> None:
    from fedsplit.owners.policy.description import ALWAYS, openings, restrictions

    table = Table("rule", "what it means", "decided", title=f"{path}: what may leave")
    for rule, sentence, when in restrictions(policy):
        table.add_row(rule, sentence, when)
    if policy.rules:
        console.print(table)
    else:
        console.print(f"{path} restricts nothing", highlight=False)
    rest = Table("rule", "what its absence allows", title="not restricted")
    for rule, sentence in openings(policy):
        rest.add_row(rule, sentence)
    console.print(rest)
    console.print(f"Whatever the rules: {ALWAYS} leave in every run.", highlight=False)
    console.print(
        "The rules bind this installed fedsplit.  An app that brings a ClientApp of its own runs "
        "without them: let the SuperNode verify apps (docs/owner.md).",
        highlight=False,
    )


def _settings(given: list[str]) -> dict[str, Any]:
    """Return a run's flat settings, checked, from files and KEY=VALUE."""
    import tomllib

    from fedsplit.settings import read_settings

    flat: dict[str, Any] = {}
    for item in given:
        path = Path(item)
        key, equals, value = item.partition("=")
        if equals and not path.is_file():
            flat[key.strip()] = _value(value.strip())
            continue
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"--against {item}: must be KEY=VALUE or TOML: {error}") from None
        # An experiment of the simulations keeps its settings in a table of their own.
        flat |= _flattened(content["run"] if isinstance(content.get("run"), dict) else content)
    return dict(read_settings(flat).to_flat())


def _value(text: str) -> Any:
    import tomllib

    try:
        return tomllib.loads(f"value = {text}")["value"]
    except ValueError:
        return text


def _flattened(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            flat |= _flattened(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
