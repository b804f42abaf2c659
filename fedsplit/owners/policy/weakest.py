"""The weakest settings that a policy allows: what a server that lies would ask for first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fedsplit.owners.policy.rules import Policy
from fedsplit.privacy.labels.base import Unprotected
from fedsplit.privacy.labels.table import LABEL_PROTECTIONS
from fedsplit.privacy.levels import Level
from fedsplit.privacy.mechanisms.table import MECHANISMS
from fedsplit.tasks import task_type

FAINT = 0.1
"""Noise ratio that is asked for where no rule bounds the noise."""


def weakest_settings(policy: Policy, task: str) -> dict[str, Any]:
    """Return the first of :func:`weak_offers`, as flat settings."""
    return next(weak_offers(policy, task))[1]


def weak_offers(policy: Policy, task: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name, flat settings) for every mechanism and label protection that a policy allows.

    Each stands at the bound that the policy sets for its level, or at next to nothing where there
    is no bound; blocks at the owner are as few as may be.  Label protections of other tasks are
    left out, and those that return no gradient come last.
    """
    common: dict[str, Any] = {
        "split.k": int(policy.rules.get("model.min_k", 0)),
        "train.rounds": 1,
        "train.epochs": 1,
    }
    if "model.max_tokens" in policy:
        common["model.max-tokens"] = int(policy["model.max_tokens"])
    labels = _labels(policy, task)
    noises = [_noise(policy, n) for n in policy.rules.get("noise.mechanisms", tuple(MECHANISMS))]
    for number, noise in enumerate(noises):
        # Noise and labels leave by different ways: each is tried beside the first of the other.
        for label in labels if not number else labels[:1]:
            name = f"{noise['privacy.mechanism']}, {label['labels.protection']}"
            yield name, {**common, **noise, **label}


def _noise(policy: Policy, name: str) -> dict[str, Any]:
    found: dict[str, Any] = {"privacy.mechanism": name}
    mechanism = MECHANISMS.get(name)
    if mechanism is None or not mechanism.protects():
        return found
    found["privacy.row-clip"] = "auto"
    level = mechanism.level
    if "noise.min_ratio" in policy:
        found["privacy.noise-ratio"] = float(policy["noise.min_ratio"])
    elif level is not None and _bound(policy, level) is not None:
        found[f"privacy.{level.key}"] = _bound(policy, level)
    else:
        found["privacy.noise-ratio"] = FAINT
    return found


def _labels(policy: Policy, task: str) -> list[dict[str, Any]]:
    sending, withholding = [], []
    for name in policy.rules.get("labels.protection", (Unprotected.name,)):
        found: dict[str, Any] = {"labels.protection": name}
        row = LABEL_PROTECTIONS.get(name.split("+")[-1])
        if row is not None and not row.fits(task_type(task)):
            continue
        if row is not None and row.level is not None and _bound(policy, row.level) is not None:
            found[f"labels.{row.level.key}"] = _bound(policy, row.level)
        if row is not None and row.withholds:
            withholding.append(found | {"train.method": "head"})  # nothing else can learn
        else:
            sending.append(found)
    return [*sending, *withholding] or [{"labels.protection": Unprotected.name}]


def _bound(policy: Policy, level: Level) -> float | None:
    rule = "" if level.bound is None else level.bound.rule
    return float(policy[rule]) if rule in policy else None
