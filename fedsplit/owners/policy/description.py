"""A policy in words: what it lets out, what it keeps, and what it says nothing about."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedsplit.owners.policy.rule_table import BEFORE, policy_rules
from fedsplit.owners.policy.rules import Policy
from fedsplit.privacy.mechanisms.table import MECHANISMS, strength_bounds

# What leaves in every run, whatever the rules say.
ALWAYS = (
    "your public name, the number of your samples and their lengths in tokens, which samples share "
    "a step, averages of loss and accuracy, and the text of refusals"
)

TEMPLATE = """\
# What this owner lets out.  fedsplit checks it before it connects, when the bottom has arrived, and
# before every frame; no setting of a run can weaken it.  Lines that are missing restrict nothing:
# `fedsplit policy check owner.toml` says what that means.  Nobody else may be able to write this
# file.  Put it at HOME/owner.toml (HOME is ~/.fedsplit, or state-dir in the node config), or name
# it in the node config: policy="/path/owner.toml".

[noise]
mechanisms = ["dchi"]     # "none" would send what the text can be read off
min_ratio = 2.0           # mean noise / median representation, measured on the bottom that came
# max_eta = 10.0          # 1 / length unit of the representation: means little without min_ratio

[model]
bottom = ["frozen"]       # "joint": each epoch shows one more noisy view of each text
max_tokens = 128
# min_k = 1               # blocks that stay here
# bottoms = ["..."]       # digests of the bottoms that may run on your text

[labels]
# without one of these, the gradients tell every training label
protection = ["client-head", "randomised-response", "marvell", "max-norm"]
max_epsilon = 2.0         # of randomised response, nats

[cti]
max_share = 0.01          # tokens with reduced noise; 0 forbids it
min_rho = 0.2             # their noise, as a share of the full one

[budget]
rounds = 20
epochs_per_run = 20
epochs_per_bottom = 60
views_per_bottom = 1      # different noises of one text, over all runs of one bottom
views_total = 4           # ... and over all bottoms
bytes_per_run = 2_000_000_000
bytes_total = 20_000_000_000
sessions_per_run = 50
sessions_per_day = 100

[transport]
allowed = ["stream"]      # "messages" pass through the SuperLink, which reads them
# own_ca = true           # needs session-ca in the node config

[valid]
# not_before = 2026-01-01
# not_after = 2026-12-31

[app]
strategies = ["split-tuning", "serving"]    # "offsite-tuning": adapters trained here leave as well
# digest = "..."          # fedsplit owner digest app.fab
"""


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
