"""The kind ``lineage-gate``: federations in which one owner returns something else.

Each case is a federation of its own, FedAvg over a small real model; all owners but the last really
train.  Every update and every average goes through the strategies' ``LineageWatch`` with ``gate =
reject``, as in a run.  A quarantined attacker is pardoned after the round, so that it comes back
and every round is an attack.

Columns: ``false_alarms`` are rounds in which an honest owner's update was refused, or the average
of the accepted ones; ``missed`` are rounds in which what the attacker returned was averaged and the
average accepted; ``named`` are rounds in which the attacker, and nobody else, was named.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from fedsplit.config import LineageConfig
from fedsplit.errors import ConfigError
from fedsplit.fingerprints.gate.owner_updates import average
from simulations.core.progress import RunProgress
from simulations.core.run_folder import RunFolder
from simulations.core.settings import Experiment, read_options
from simulations.core.tables import make_table
from simulations.lineage.gate_owners import (
    ANSWERS,
    LocalWork,
    OwnerTraining,
    Update,
    make_owner_training,
)
from strategies.rounds.lineage_setup import owners_gate
from strategies.rounds.lineage_watch import LineageWatch

OPTIONS: dict[str, Any] = {
    "models": "",  # a folder with two independent checkpoints of one shape; empty: MiniLM
    "base": "",  # which of them; empty: the first that has a partner
    "rounds": 100,
    "owners": 4,
    "blocks": 1,  # the last blocks, which owners train and return
    "steps": 2,
    "batch": 4,
    "length": 16,
    "lr": 5e-5,
    "alone-rounds": 20,  # of the cases that check the aggregate alone
}
CASES = (
    ("a: honest owners", "honest", True),
    ("b: an independent model's layers", "independent", True),
    ("c: noise of the right norm", "noise", True),
    ("d: permuted but equivalent", "permuted", True),
    ("b, aggregate checked alone", "independent", False),
    ("c, aggregate checked alone", "noise", False),
)
BLENDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)


@dataclass
class Tally:
    """What one case came to."""

    rounds: int = 0
    false_alarms: int = 0
    missed: int = 0
    named: int = 0
    set_aside: int = 0
    honest_blocks: list[float] = field(default_factory=list)
    attack_blocks: list[float] = field(default_factory=list)
    averages: list[float] = field(default_factory=list)
    seconds: float = 0.0
    checks: int = 0


def run(experiment: Experiment, folder: RunFolder, console: Console) -> None:
    """Carry out the experiment.

    Raises:
        ConfigError: an option out of range, or no two checkpoints of one shape.
    """
    options = read_options(experiment.options, OPTIONS)
    for name in ("rounds", "owners", "blocks", "steps", "batch"):
        if options[name] < (2 if name == "owners" else 1):
            raise ConfigError(f"options.{name}={options[name]}: must be >= 1 (owners: >= 2)")
    folder.write_config(experiment.config.to_flat() | {"options": options})
    work = LocalWork(options["steps"], options["batch"], options["length"], options["lr"])
    owners, config = options["owners"], LineageConfig(gate="reject", evidence=False)
    rows: list[dict[str, Any]] = []
    # Every round of an attack would be a warning.
    logging.getLogger("strategies.rounds.lineage_watch").setLevel(logging.ERROR)
    with RunProgress(console) as progress:
        progress.stage("the model")
        models, wanted, blocks = (options[name] for name in ("models", "base", "blocks"))
        seed = experiment.config.seed
        base, donor, training = make_owner_training(models, wanted, blocks, owners, work, seed)
        folder.record(about=experiment.about, base=base, donor=donor, owners=owners)
        tallies: dict[str, Tally] = {}
        for case, answer, screened in CASES:
            progress.stage(case)
            training.load(training.start)
            watch = LineageWatch(
                config, None, owners=owners_gate(training.model, config), check_owners=screened
            )
            rounds = int(options["rounds" if screened else "alone-rounds"])
            tallies[case] = federation(training, watch, answer, owners, rounds, progress)
            rows.append({"case": case, **row_of(tallies[case])})
            folder.record(rows=rows)
        progress.stage("a share of a stranger")
        blends = blended(training, config)
        folder.record(blends=blends, thresholds=thresholds(tallies, config))
    print_rows(console, rows, blends)
    if any(row["false_alarms"] or row["missed"] for row in rows[:3]):
        console.print("the goal (no false alarm, no attack missed) was not reached", style="red")


def federation(
    training: OwnerTraining,
    watch: LineageWatch,
    answer: str,
    owners: int,
    rounds: int,
    progress: RunProgress,
) -> Tally:
    """Run rounds of FedAvg in which the last owner answers by ``answer``."""
    tally, state = Tally(), training.start
    attacker = f"owner-{owners - 1}"
    attacked = answer != "honest"
    for number in range(1, rounds + 1):
        updates: dict[str, Update] = {
            f"owner-{i}": training.honest(state, i, number) for i in range(owners - 1)
        }
        updates[attacker] = ANSWERS[answer](training, state, owners - 1, number)
        began = time.perf_counter()
        row = watch.open_round(number)
        kept = watch.screen(row, updates)
        mine = {name: updates[name] for name in kept}
        weights = dict.fromkeys(mine, 1.0)
        mean = average(mine, weights) if mine else None
        if mean is not None:
            watch.check_average(row, mean, mine, weights)
        watch.close_round(row)
        tally.seconds += time.perf_counter() - began
        tally.checks += len(row.get("owners", ())) + 1
        count(tally, row, kept, attacker if attacked else None)
        if mean is not None and not row.get("rejected"):
            state = mean
        for name in list(watch.quarantined):  # the attacker comes back: every round is an attack
            watch.lift_quarantine(name)
        progress.update(number / rounds)
    return tally


def count(tally: Tally, row: Mapping[str, Any], kept: list[str], attacker: str | None) -> None:
    """Add one round."""
    tally.rounds += 1
    judged = row.get("owners", {})
    for name, found in judged.items():
        scores = tally.attack_blocks if name == attacker else tally.honest_blocks
        if found.get("worst") is not None:
            scores.append(found["worst"])
    blamed = {name for name, found in judged.items() if found["action"] == "quarantine"}
    aside = {name for name, found in judged.items() if found["action"] == "set aside"}
    if row.get("named"):
        blamed.add(row["named"])
    rejected = bool(row.get("rejected"))
    if row.get("score") is not None:
        tally.averages.append(row["score"])
    innocent = (blamed | aside) - ({attacker} if attacker else set())
    among = attacker is not None and attacker in kept
    tally.false_alarms += bool(innocent) or (rejected and not among)
    tally.missed += among and not rejected
    tally.named += attacker is not None and blamed | aside == {attacker}
    tally.set_aside += attacker in aside if attacker else 0


def row_of(tally: Tally) -> dict[str, Any]:
    """Return a case's row; least and most are over blocks, owners and rounds."""
    counts = ("rounds", "false_alarms", "missed", "named", "set_aside")
    return {name: getattr(tally, name) for name in counts} | {
        "honest_least_block": min(tally.honest_blocks, default=None),
        "attacker_most_worst_block": max(tally.attack_blocks, default=None),
        "average_least_score": min(tally.averages, default=None),
        "ms_per_check": 1000 * tally.seconds / max(1, tally.checks),
    }


def blended(training: OwnerTraining, config: LineageConfig) -> list[dict[str, Any]]:
    """Measure how much of a stranger an update may hold before it is refused."""
    out: list[dict[str, Any]] = []
    for share in BLENDS:
        training.load(training.start)
        watch = LineageWatch(config, None, owners=owners_gate(training.model, config))
        row = watch.open_round(1)
        watch.screen(row, {"owner": training.blend(training.start, share, 1)})
        found = row["owners"]["owner"]
        names = ("worst", "score", "pcs", "verdict", "action")
        out.append({"share": share} | {name: found.get(name) for name in names})
    return out


def thresholds(tallies: Mapping[str, Tally], config: LineageConfig) -> dict[str, Any]:
    """Return the block threshold in use, and the middle between honest work's and attacks'."""
    honest = [s for t in tallies.values() for s in t.honest_blocks]
    attacking = [t for case, t in tallies.items() if case.startswith(("b", "c"))]
    attacks = [s for t in attacking for s in t.attack_blocks]
    least, most = min(honest, default=None), max(attacks, default=None)
    return {
        "used_block": config.block,
        "used_mean": config.in_lineage,
        "honest_least_block": least,
        "honest_updates": len(honest),
        "attack_most_worst_block": most,
        "attack_updates": len(attacks),
        "derived_block": None if least is None or most is None else (least + most) / 2,
    }


def print_rows(console: Console, rows: list[dict[str, Any]], blends: list[dict[str, Any]]) -> None:
    """Print what each case came to, and where a share of a stranger is refused."""
    names = list(rows[0])
    for title, columns, found, left in (
        ("the gate in federations", names[:6], rows, 1),
        ("what it saw", [names[0], *names[6:]], rows, 1),
        ("an update with a share of a stranger in it", list(blends[0]), blends, 0),
    ):
        heads = [name.replace("_", " ") for name in columns]
        shown = ([_shown(row[name]) for name in columns] for row in found)
        console.print(make_table(heads, shown, title=title, left=left))


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)
