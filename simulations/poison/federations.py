"""The kind ``poison``: federations with liars, under the defaults of ``robust`` and ``lineage``.

Each cell is one federation in this process: the real strategy, owners and sessions, some of whose
owners lie (:mod:`simulations.poison.liars`).  Rows: ``loss`` is the honest owners' mean loss on
their own held-out text after the last round (nats), ``honest_loss`` the same owners' where nobody
lies; ``named`` the liars that were charged, quarantined or lost, of ``colluders``; ``false_alarms``
the rounds in which an honest owner was, or the gate refused an honest average; ``alike`` the liars
that weighed less in some round since their changes were alike, ``alike_honest`` the honest owners
that did.  ``trigger`` is the loss on the backdoor's sentence.  ``change_since_base`` and so on are
the largest of an honest owner's tensor, ``quality`` the largest rise of the public loss in a round,
in units of the base's.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from fedsplit.config import RunConfig
from fedsplit.errors import RunError
from fedsplit.registry import pick
from fedsplit.settings import read_settings
from simulations.core.cells import CellStore, Row, product, run_cells
from simulations.core.run_folder import RunFolder
from simulations.core.settings import Experiment, numbers, read_options
from simulations.core.tables import make_table
from simulations.poison.liars import LIES, LyingGrid
from simulations.runtime.federated import owner_environment, read_server
from simulations.runtime.local_run import environment, run_strategy

OPTIONS: dict[str, Any] = {
    "strategies": ["offsite-tuning", "split-tuning"],
    "cases": [name for name in LIES if name != "honest"],
    "colluders": "1,2,3",
    "rounds": 10,
    "honest-rounds": 100,
}
RUN_ID = 1
SINCE = ("growth-since-base", "change-since-base", "growth-since-last", "change-since-last")


def run(experiment: Experiment, folder: RunFolder, console: Console) -> None:
    """Carry out the experiment; finished federations are kept if it is killed.

    Raises:
        ConfigError: an unknown option, strategy or case.
    """
    options = read_options(experiment.options, OPTIONS)
    for case in options["cases"]:
        pick(LIES, case, "options.cases")
    colluders = numbers("colluders", options["colluders"], int)
    store = CellStore.open(
        folder, experiment.config, options, ("strategies", "cases", "colluders", "honest-rounds")
    )
    kept: dict[str, Row] = {}

    def make(strategy: str, case: str, colluders: int, rounds: int) -> list[Row]:
        liars = range(colluders)
        row = federation(experiment, strategy, case, liars, rounds, options["rounds"])
        return [{"strategy": strategy, "case": case, "colluders": colluders, **row}]

    strategies, rounds = options["strategies"], [options["rounds"]]
    honest: dict[str, list[Any]] = {"case": ["honest"], "colluders": [0]}
    keys = [
        *product(strategy=strategies, **honest, rounds=rounds),
        *product(colluders=colluders, strategy=strategies, case=options["cases"], rounds=rounds),
        *product(strategy=strategies, **honest, rounds=[options["honest-rounds"]]),
    ]

    def recorded(rows: list[Row]) -> dict[str, Any]:
        for row in rows:
            if row["case"] == "honest" and row["rounds"] == options["rounds"]:
                kept[row["strategy"]] = row
            honest = kept.get(row["strategy"])
            row["honest_loss"] = loss_without(honest, row["colluders"]) if honest else None
            row["excess"] = honest and row["loss"] / row["honest_loss"] - 1
        return {"rows": rows}

    rows = run_cells(experiment, folder, console, store, keys, make, recorded)
    print_rows(console, rows)


def federation(
    experiment: Experiment,
    strategy: str,
    case: str,
    liars: Iterable[int],
    rounds: int,
    schedule: int,
) -> Row:
    """Run one federation and return its row.

    Args:
        experiment: whose settings are run; the groups are those of both strategies.
        strategy: of the run.
        case: what the liars do.
        liars: their indices.
        rounds: of the run.
        schedule: rounds after which a run is evaluated.

    Raises:
        RunError: the federation ended with an error.
    """
    lying = LyingGrid(LIES[case], frozenset(liars))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        config = settings(experiment, strategy, rounds, schedule, folder / "server")
        with environment(owner_environment(folder / "homes")), lying.at_work():
            run_strategy(config, lying.grid(config, RUN_ID))
        content = read_server(folder / "server")
        shutil.rmtree(folder / "homes", ignore_errors=True)
    return row_of(content, {f"owner-{i}" for i in lying.liars}, rounds)


def settings(
    experiment: Experiment, strategy: str, rounds: int, schedule: int, folder: Path
) -> RunConfig:
    """Return a cell's settings."""
    config = read_settings({**experiment.run, "strategy": strategy})
    output = replace(config.output, dir=str(folder), evaluate_every=min(rounds, schedule))
    return replace(config, train=replace(config.train, rounds=rounds), output=output)


def row_of(content: Mapping[str, Any], liars: set[str], rounds: int) -> Row:
    """Return what a federation came to.

    Raises:
        RunError: it was never evaluated.
    """
    named: set[str] = set()
    alike: set[str] = set()
    alarms, worst, loss, trigger = 0, dict.fromkeys(SINCE, 0.0), None, None
    owners: dict[str, dict[str, float]] = {}
    for row in content["rounds"]:
        blamed = blamed_in(row)
        named |= blamed & liars
        alike |= {n for n, part in contributions_of(row).items() if part.get("alike", 1.0) < 1.0}
        verdict = row.get("lineage", {}).get("verdict", "in_lineage")
        alarms += bool(blamed - liars) or (not liars and verdict != "in_lineage")
        for owner, found in row.get("lineage", {}).get("owners", {}).items():
            for key, value in found.get("scale", {}).items() if owner not in liars else ():
                worst[key] = max(worst[key], value["value"])
        if metrics := row.get("evaluate", {}).get("metrics", {}).get("owners"):
            owners = {n: {k: m[k] for k in ("loss", "targets")} for n, m in metrics.items()}
            loss = mean_loss(metrics[n] for n in metrics.keys() - liars)
            trigger = mean_loss(metrics[n] for n in metrics.keys() & liars)
    if loss is None:
        raise RunError(f"rounds={rounds}: the federation was never evaluated")
    losses = [row["plug_in_loss"] for row in content["rounds"] if "plug_in_loss" in row]
    base = content.get("full_zero_shot_loss")
    rises = [b - a for a, b in zip([base, *losses], losses, strict=False)] if losses else []
    return {
        "rounds": rounds,
        "owners": owners,
        "loss": loss,
        "honest_loss": None,
        "excess": None,
        "named": len(named),
        "false_alarms": int(alarms),
        "alike": len(alike & liars),
        "alike_honest": len(alike - liars),
        "trigger": trigger if trigger is not None and math.isfinite(trigger) else None,
        "public_loss": losses[-1] if losses else None,
        "quality": max(rises) / base if base and rises else None,
        **{key.replace("-", "_"): value for key, value in worst.items()},
    }


def loss_without(row: Row, liars: int) -> float:
    """Return an honest federation's mean loss over the owners that do not lie in another one."""
    names = {f"owner-{i}" for i in range(liars)}
    return mean_loss(found for name, found in row["owners"].items() if name not in names)


def contributions_of(row: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """Return what became of each owner's change in a round."""
    found: Mapping[str, Mapping[str, Any]] = row.get("lineage", {}).get("contributions", {})
    return found


def blamed_in(row: Mapping[str, Any]) -> set[str]:
    """Return the owners that a round names: charged, refused by the gate, or lost."""
    lineage, train = row.get("lineage", {}), row.get("train", {})
    judged = lineage.get("owners", {})
    refused = {name for name, found in judged.items() if found["action"] != "accept"}
    named = {lineage["named"]} if lineage.get("named") else set()
    return {*lineage.get("charged", {}), *train.get("lost", {}), *refused, *named}


def mean_loss(rows: Iterable[Mapping[str, float]]) -> float:
    """Return the mean of the rows' losses, weighted by their targets; NaN without any."""
    found = [(row["loss"], row["targets"]) for row in rows]
    whole = sum(targets for _, targets in found)
    return sum(loss * targets for loss, targets in found) / whole if whole else math.nan


def print_rows(console: Console, rows: list[Row]) -> None:
    """Print what each federation came to."""
    heads = ["strategy", "case", "colluders", "rounds", "loss", "honest_loss", "excess", "named"]
    heads += ["false_alarms", "alike", "alike_honest", "trigger", "public_loss"]
    lines = ([_shown(row[head]) for head in heads] for row in rows)
    console.print(make_table(heads, lines, title="What liars reach", left=2))


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)
