"""Rules about the averages that an owner reports of a session."""

from __future__ import annotations

from collections.abc import Mapping

from fedsplit.confusion import coarse, is_count
from fedsplit.owners.home import in_simulation
from fedsplit.owners.ledger.disclosure import Averages
from fedsplit.owners.ledger.spending import ReportTotals
from fedsplit.owners.policy.rules import Breach, Policy
from fedsplit.sums import is_sum


def report_breaches(
    policy: Policy, asked: Averages, ever: ReportTotals, today: str
) -> list[Breach]:
    """Return every rule that a report would break.

    Args:
        policy: the owner's.
        asked: the report.
        ever: totals of all reports.
        today: UTC day.
    """
    rules, told = policy.rules, [key for key in asked.metrics if is_private(key)]
    found: list[Breach] = []
    if not told:  # counts that the session's own frames have shown
        return found
    if rules.get("reports.allow") is False:
        found.append(Breach("reports.allow", "averages", "none"))
    if asked.texts < rules.get("reports.min_texts", 0):
        bound = f">= {rules['reports.min_texts']}"
        found.append(Breach("reports.min_texts", asked.texts, bound))
    if "reports.epsilon" in rules and (
        asked.epsilon is None or asked.epsilon > rules["reports.epsilon"]
    ):
        shown = "no noise" if asked.epsilon is None else asked.epsilon
        found.append(Breach("reports.epsilon", shown, f"<= {rules['reports.epsilon']:g}"))
    if set(filter(is_sum, told)) - sums_that_leave(policy, asked.metrics):
        found.append(Breach("reports.counts", "counts of classes", "none"))
    counted: dict[str, float] = {"reports.max_per_day": ever.days.get(today, 0) + 1}
    if "reports.max_epsilon" in rules:
        counted["reports.max_epsilon"] = ever.epsilon + (asked.epsilon or float("inf"))
    for rule, value in counted.items():
        if rule in rules and value > rules[rule]:
            found.append(Breach(rule, value, f"<= {rules[rule]:g}"))
    return found


PRIVATE = frozenset({"loss", "accuracy"})
"""Averages of a report that depend on more than what the session's frames have shown."""


def is_private(key: str) -> bool:
    """Whether a number of a report depends on more than what the session's frames have shown."""
    return key in PRIVATE or is_sum(key)


def sums_that_leave(policy: Policy, metrics: Mapping[str, float | int]) -> set[str]:
    """Return the additive numbers of a report (counts of classes ...) that may leave.

    Exact ones, so not beside noise.  Without any policy only counts of classes that single no text
    out (:func:`fedsplit.confusion.coarse`); simulated owners' labels are the experimenter's.
    """
    rules = policy.rules
    sums = set(filter(is_sum, metrics))
    if "reports.epsilon" in rules or rules.get("reports.allow") is False:
        return set()
    if rules:
        return sums if rules.get("reports.counts", False) else set()
    if in_simulation():
        return sums
    return set(filter(is_count, sums)) if coarse(metrics) else set()
