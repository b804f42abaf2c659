"""``fedsplit attack policy``: what a lying server reads of one's own texts under a policy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from fedsplit.commands.options import Home, JsonFile, owner_home, write_json
from fedsplit.observe.console import console

FAR, LOUD = "words far from each other", "half of the words a thousand times as long"


def register(app: typer.Typer) -> None:
    """Add the command to ``app``, the attacks' group."""
    app.command("policy")(policy)


def policy(
    path: Annotated[Path, typer.Argument(help="the policy, such as owner.toml")],
    model: Annotated[str, typer.Option(help="folder, hub name or package:NAME of the model")],
    data: Annotated[Path, typer.Option(help="your texts: .csv, .jsonl, ... or a folder")],
    text_column: Annotated[str, typer.Option(help="of the texts")] = "text",
    label_column: Annotated[str, typer.Option(help="of the labels, if there are any")] = "",
    most: Annotated[
        float, typer.Option(help="share that may be read where the policy has no floor of its own")
    ] = 0.4,
    home: Home = None,
    json_path: JsonFile = None,
) -> None:
    """Play a lying server: the weakest offers that a policy allows, with honest and false bottoms.

    For each allowed mechanism and label protection, at its bound, the owner's own checks are asked;
    what they let pass is read by the project's attackers.  Exit code 1 if more is read than the
    policy's floor (or --most) allows.  Whole sequences of lies against a running owner:
    `python -m simulations run adversary` in a clone.
    """
    from fedsplit.attacks.measuring import measure
    from fedsplit.data import load_splits
    from fedsplit.models import load
    from fedsplit.owners.home import OwnerHome
    from fedsplit.owners.measuring import LABELS, TOKENS
    from fedsplit.owners.policy.rules import Asked, Policy
    from fedsplit.owners.policy.weakest import weak_offers
    from fedsplit.owners.split.by_hand import measure_by_hand
    from fedsplit.settings import read_settings

    rules = Policy.load(path)
    texts, _ = load_splits(
        "file", path=str(data), text_column=text_column, label_column=label_column
    )
    about: dict[str, Any] = {"model.name": model, "model.task": "causal-lm"}
    classes = None
    if texts.labels:
        classes = max([2, *(int(label) + 1 for label in texts.labels)])
        about |= {"model.task": "sequence-classification", "model.labels": classes}
    loaded = load(model, str(about["model.task"]), num_labels=classes)
    secret = OwnerHome(owner_home(home)).secret(0, "owner")
    bottoms: dict[str, Callable[[Any], None]] = {"as it is": lambda m: None, FAR: far, LOUD: loud}
    bounds = {TOKENS: 1 - float(rules.rules.get(TOKENS, 1 - most))}
    bounds[LABELS] = float(rules.rules.get(LABELS, most))
    found: list[dict[str, Any]] = []
    for name, flat in weak_offers(rules, str(about["model.task"])):
        config = read_settings({**about, **flat})
        refused = rules.settings_breaches(Asked(config.to_flat(), own_ca=True))
        if refused:
            found.append({"offer": name, "refused": ", ".join(b.rule for b in refused)})
            continue
        for bottom, lie in bottoms.items():
            made = copy.deepcopy(loaded.model)
            lie(made)
            figures = measure_by_hand(rules, config, made, loaded.tokenizer, texts, secret, measure)
            for each in figures:
                read = each.readings[0].read
                breach = each.breach(rules)
                found.append(
                    {
                        "offer": name,
                        "bottom": bottom,
                        "of": "tokens" if each.rule == TOKENS else "labels",
                        "attacker": each.readings[0].attack,
                        "read": read,
                        "refused": each.rule if breach is not None else "",
                        "too much": breach is None and read > bounds[each.rule] + _chance(each),
                    }
                )
    console.print(_table(found))
    write_json(json_path, found)
    if any(row.get("too much") for row in found):
        raise typer.Exit(1)


def far(model: Any) -> None:
    """Put every word in a random direction, as far from all others as may be, at one length."""
    import torch

    table = model.get_input_embeddings().weight
    with torch.no_grad():
        length = table.float().norm(dim=1).median()
        chance = torch.Generator().manual_seed(0)
        drawn = torch.randn(table.shape, generator=chance)
        table.copy_(drawn / drawn.norm(dim=1, keepdim=True) * length)


def loud(model: Any) -> None:
    """Make every other word a thousand times as long as it is."""
    import torch

    table = model.get_input_embeddings().weight
    with torch.no_grad():
        table[::2] *= 1000.0


def _chance(figures: Any) -> float:
    """Return what a share of 0 or 1 may miss by: three standard errors of a half at most."""
    targets = int(figures.readings[0].targets)
    return float(1.5 / max(1, targets) ** 0.5)


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("offer", "bottom", "read", "by", "refused by", "")
    for row in rows:
        share = f"{100 * row['read']:.1f} % of {row['of']}" if "read" in row else "-"
        late = "too much" if row.get("too much") else ""
        cells = (row.get("bottom", "-"), share, row.get("attacker", "-"), row["refused"] or "-")
        table.add_row(row["offer"], *cells, late)
    return table
