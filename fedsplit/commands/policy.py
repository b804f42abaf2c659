"""``fedsplit policy``: what an owner's rules mean, and whether a run would be accepted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from fedsplit.commands.options import Home, JsonFile, owner_home, write_json, write_template
from fedsplit.errors import ConfigError
from fedsplit.observe.console import console

if TYPE_CHECKING:
    from fedsplit.owners.measuring import Figures
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


@policy_app.command()
def measure(
    path: Annotated[Path, typer.Argument(help="the policy, such as owner.toml")],
    model: Annotated[str, typer.Option(help="folder, hub name or package:NAME of the model")],
    data: Annotated[Path, typer.Option(help="your texts: .csv, .jsonl, ... or a folder")],
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="a run's settings: a TOML file, or KEY=VALUE; repeatable"),
    ] = None,
    text_column: Annotated[str, typer.Option(help="of the texts")] = "text",
    label_column: Annotated[str, typer.Option(help="of the labels, if there are any")] = "",
    home: Home = None,
    json_path: JsonFile = None,
) -> None:
    """Run the attackers on your own texts, as on a run's first contact, and print what they read.

    Settings that are not given are the weakest that the policy allows: its first mechanism at its
    noise.min_ratio, clipped rows, its least k.
    """
    from fedsplit.attacks.measuring import measure as attackers
    from fedsplit.config import RunConfig
    from fedsplit.data import load_splits
    from fedsplit.models import load
    from fedsplit.owners.home import OwnerHome
    from fedsplit.owners.policy.rules import Policy
    from fedsplit.owners.policy.weakest import weakest_settings
    from fedsplit.owners.split.by_hand import measure_by_hand
    from fedsplit.settings import read_settings
    from fedsplit.tasks import announced_column, task_of, task_type

    policy = Policy.load(path)
    given = _given(setting or [])
    usual = "sequence-classification" if label_column else "causal-lm"
    task = str(given.get("model.task", usual))
    weakest = {"model.name": model, "model.task": task, **weakest_settings(policy, task)}
    column = None
    if label_column and not task_type(task).exclusive:  # what labels mean is the settings' to say
        column = announced_column(RunConfig.from_flat({"model.task": task, **given}))
    texts, _ = load_splits(
        "file", path=str(data), text_column=text_column, label_column=label_column, column=column
    )
    if texts.labels and column is None:
        weakest["model.labels"] = max([2, *(int(label) + 1 for label in texts.labels)])
    config = read_settings({**weakest, **given})
    loaded = load(model, config.model.task, num_labels=task_of(config).outputs)
    secret = OwnerHome(owner_home(home)).secret(config.seed, "owner")
    found = measure_by_hand(
        policy, config, loaded.model, loaded.tokenizer, texts, secret, attackers
    )
    breaches = []
    for figures in found:
        console.print(_readings(figures))
        console.print(str(figures), highlight=False)
        if (breach := figures.breach(policy)) is not None:
            breaches.append(breach)
            console.print(Text("refused", "red"), str(breach), highlight=False)
    write_json(json_path, [figures.to_json() for figures in found])
    if breaches:
        raise typer.Exit(1)


def _readings(figures: Figures) -> Table:
    what = "tokens" if figures.rule.endswith("privacy") else "labels"
    table = Table("attacker", "read", "95 % interval", what, "seconds", title=f"{what} read")
    for reading in figures.readings:
        interval = f"{100 * reading.low:.1f} to {100 * reading.high:.1f} %"
        share, count = f"{100 * reading.read:.1f} %", f"{reading.targets:,}"
        table.add_row(reading.attack, share, interval, count, f"{reading.seconds:.1f}")
    return table


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
    from fedsplit.settings import read_settings

    return dict(read_settings(_given(given)).to_flat())


def _given(given: list[str]) -> dict[str, Any]:
    """Return the settings that files and KEY=VALUE name."""
    import tomllib

    flat: dict[str, Any] = {}
    for item in given:
        path = Path(item)
        key, equals, value = item.partition("=")
        if equals and not path.is_file():
            flat[key.strip()] = _value(value.strip())
            continue
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{item}: must be KEY=VALUE or TOML: {error}") from None
        # An experiment of the simulations keeps its settings in a table of their own.
        flat |= _flattened(content["run"] if isinstance(content.get("run"), dict) else content)
    return flat


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
