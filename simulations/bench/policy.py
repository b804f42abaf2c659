"""``bench policy``: what an owner's checks cost a round of split tuning, and its first contact.

The same run in one process, with the policy that ``fedsplit policy init`` writes and without any.
Figures are processor seconds, which other work on a machine hardly moves.  A round's is the
difference between a run of one round and a longer one, so that the first contact (bottom received,
measured by the owner's attackers) is in none of them.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from fedsplit.config import RunConfig
from fedsplit.owners.policy.description import TEMPLATE
from fedsplit.owners.policy.rules import Asked, Policy, refuse
from simulations.bench.figures import JsonPath, Overrides, publish
from simulations.core.settings import load_experiment
from simulations.core.tables import make_table
from simulations.runtime.local_run import environment, run_in_process
from simulations.runtime.machine import machine

ROUNDS = 2  # beside the first


def run(console: Console, json_path: JsonPath = None, set_: Overrides = None) -> dict[str, Any]:
    """Measure a round and a first contact with the template's policy and without a policy."""
    config = load_experiment("bench-policy", set_ or ()).config
    policy = Policy.load(TEMPLATE)
    refuse(policy.settings_breaches(Asked(config.to_flat(), own_ca=True)))
    figures: dict[str, Any] = {"machine": machine(), "owners": config.data.owners}
    ways = {"without a policy": "", "policy init": str(TEMPLATE)}
    seconds(config, 1, "")  # model and libraries are loaded once
    for way, path in ways.items():
        first, longer = (seconds(config, rounds, path) for rounds in (1, 1 + ROUNDS))
        figures[way] = {"first_s": first, "round_s": (longer - first) / ROUNDS}
        console.print(
            f"  {way}: first round {first:.1f} s, a later one {figures[way]['round_s']:.1f}"
        )
    without, checked = (figures[way] for way in ways)
    figures["ratio"] = checked["round_s"] / without["round_s"]
    figures["first_contact_s"] = (checked["first_s"] - without["first_s"]) / config.data.owners
    rows = [
        (way, f"{figures[way]['first_s']:.1f}", f"{figures[way]['round_s']:.2f}") for way in ways
    ]
    title = (
        f"a later round takes {figures['ratio']:.2f} x, "
        f"measuring {figures['first_contact_s']:.1f} s an owner, once"
    )
    heads = ("", "first round, s", "later round, s")
    return publish(console, json_path, figures, [make_table(heads, rows, title=title)])


def seconds(config: RunConfig, rounds: int, policy: str) -> float:
    """Return the processor seconds of a run in this process, owners and server together."""
    config = replace(config, train=replace(config.train, rounds=rounds))
    with (
        tempfile.TemporaryDirectory(prefix="fedsplit-bench-") as folder,
        environment({"FEDSPLIT_POLICY": policy}),
    ):
        begin = time.process_time()
        run_in_process(config, Path(folder))
        return time.process_time() - begin
