"""A policy in words: what it lets out, what it keeps, and what it says nothing about."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsplit.owners.policy.rule_table import BEFORE, policy_rules
from fedsplit.owners.policy.rules import Policy
from fedsplit.privacy.mechanisms.table import MECHANISMS, strength_bounds

# What leaves in every run, whatever the rules say.
ALWAYS = (
    "your public name, the number of your samples and their lengths in tokens, which samples share "
    "a step, averages of loss and accuracy, and the text of refusals"
)

TEMPLATE = Path(__file__).with_name("owner.toml")


def restrictions(policy: Policy) -> list[tuple[str, str, str]]:
    """Return (rule, sentence, moment) of every rule that the policy has."""
    rules = policy_rules().items()
    return [(name, rule.says(policy[name]), rule.when) for name, rule in rules if name in policy]


def openings(policy: Policy) -> list[tuple[str, str]]:
    """Return (rule, what its absence allows) of every rule that the policy does not have.

    A bound on a level is not missed where a noise ratio is demanded, nor where no mechanism with
    that level is allowed.
    """
    allowed = policy.rules.get("noise.mechanisms", tuple(MECHANISMS))
    levels = [m.level for name, m in MECHANISMS.items() if name in allowed]
    needed = {level.bound.rule for level in levels if level is not None and level.bound is not None}
    unmissed = set(strength_bounds()) - (set() if "noise.min_ratio" in policy else needed)
    return [
        (name, rule.absent)
        for name, rule in policy_rules().items()
        if name not in policy and name not in unmissed and rule.absent != "-"
    ]


def undecided(policy: Policy, flat: Mapping[str, Any]) -> list[str]:
    """Return the rules that the settings of a run cannot decide, which are checked later."""
    late = [name for name, r in policy_rules().items() if name in policy and r.when != BEFORE]
    if flat["privacy.cti"] == "off":
        late = [name for name in late if not name.startswith("cti.")]
    return late
