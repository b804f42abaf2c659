"""Rules about steps on weights that will leave, judged before the first is taken.

An update of weights shows what it was trained on: after one step on one text it is that text's
gradient.  So the record comes before the steps, and nothing that was trained leaves without one.
What DP-SGD costs is composed over all of an owner's records, whatever run or model they belong to.
"""

from __future__ import annotations

from fedsplit.owners.ledger.disclosure import Training
from fedsplit.owners.ledger.spending import DELTA, TrainingTotals
from fedsplit.owners.policy.rules import Breach, Policy


def training_breaches(
    policy: Policy, asked: Training, run: TrainingTotals, ever: TrainingTotals, today: str
) -> list[Breach]:
    """Return every rule that a session's training would break.

    Args:
        policy: the owner's.
        asked: what is about to be trained.
        run: totals of the run.
        ever: totals of all runs.
        today: UTC day.
    """
    found: list[Breach] = []

    def judge(ok: bool, rule: str, value: object, bound: str) -> None:
        if not ok:
            found.append(Breach(rule, value, bound))

    rules = policy.rules
    if rules.get("offsite.require_dp"):
        judge(asked.noise is not None, "offsite.require_dp", "exact updates", "DP-SGD (dp.*)")
    for rule, value in (("offsite.min_batch", asked.batch), ("offsite.min_steps", asked.steps)):
        if rule in rules:
            judge(value >= rules[rule], rule, value, f">= {rules[rule]}")
    counted = {
        "offsite.max_rounds": run.sessions + 1,
        "offsite.max_rounds_per_day": ever.days.get(today, 0) + 1,
    }
    for rule, value in counted.items():
        if rule in rules:
            judge(value <= rules[rule], rule, value, f"<= {rules[rule]}")
    if asked.noise is not None:
        delta = float(rules.get("budget.dp_delta", DELTA))
        for rule, totals in (("offsite.max_epsilon", run), ("budget.max_dp_epsilon", ever)):
            if rule in rules:
                spent = totals.epsilon(delta, asked.noise)
                judge(spent <= rules[rule], rule, spent, f"<= {rules[rule]:g} (delta {delta:g})")
    return found
