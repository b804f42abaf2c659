"""The scores of a run beside those of its centralised twin, and who was taken for what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedsplit.entities import types_of
from simulations.core.units import score
from simulations.report.facts import Facts

# Numbers of ``utility`` that are no scores of the federated model.
NO_SCORES = {
    *("federated", "centralised", "baseline", "samples", "centralised_steps_per_s"),
    *("num-examples", "targets"),
}
MOST_CLASSES = 16  # whose table fits on a page


def score_rows(utility: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return (score, federated, centralised) of every score of the task, in words and per cent."""
    beside = utility.get("centralised_scores")
    twin = beside if isinstance(beside, Mapping) else {}
    found = []
    metric = str(utility.get("metric", ""))
    told = {metric: utility.get("federated"), **utility}
    for name, value in told.items():
        if isinstance(value, float) and name not in NO_SCORES:
            other = utility.get("centralised") if name == metric else twin.get(name)
            found.append((name, score(name, value), "" if other is None else score(name, other)))
    return found


BY_CLASS = {
    "recalls": "found of it (recall)",
    "precisions": "right of what was taken for it (precision)",
    "entity-f1-by-type": "F1",
}


def class_rows(facts: Facts) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Return (headings, for each class, or type of entity, its scores in per cent).

    Empty where no scores by class were reported.
    """
    utility = facts.get("utility")
    found = {
        told: utility[key] for key, told in BY_CLASS.items() if isinstance(utility.get(key), list)
    }
    if not found:
        return [], []
    count = len(next(iter(found.values())))
    known = facts.results.get("classes")
    names = [str(name) for name in known] if isinstance(known, list) else []
    if "entity-f1-by-type" in utility:
        names = list(types_of(names))
    if len(names) != count:
        names = [str(number) for number in range(count)]
    shares = zip(*found.values(), strict=True)
    rows = [(n, [f"{100 * x:.1f} %" for x in own]) for n, own in zip(names, shares, strict=True)]
    return list(found), rows


def confusion_rows(facts: Facts) -> tuple[list[str], list[tuple[str, list[int]]]]:
    """Return (names of the classes, for each class how many of its texts were taken for which).

    Empty where no counts were reported, or there are too many classes.
    """
    table = facts.get("utility").get("confusion")
    if not isinstance(table, list) or not 2 <= len(table) <= MOST_CLASSES:
        return [], []
    known = facts.results.get("classes")
    names = [str(name) for name in known] if isinstance(known, list) else []
    if len(names) != len(table):
        names = [str(number) for number in range(len(table))]
    return names, [(name, [int(x) for x in row]) for name, row in zip(names, table, strict=True)]
