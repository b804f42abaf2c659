"""What simulated owners sent, as their own ledgers tell it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fedsplit.errors import FedsplitError
from fedsplit.owners.ledger.chain import read_ledger
from fedsplit.owners.ledger.totals import Totals
from fedsplit.owners.naming import POLICY_VARIABLE
from fedsplit.owners.policy.rules import Policy

Row = dict[str, Any]


def sent_by_owners(homes: Path) -> list[Row]:
    """Return a row per owner of one run's homes: ``owner``, ``bytes``, ``kinds``, ``sessions`` ...

    ``views`` counts the different noises of one text that left, ``cost`` what they add up to by
    unit, each as its maximum and median over texts; ``budget`` has the policy's own bounds.  An
    owner whose ledger cannot be read has ``error``.
    """
    found = []
    for home in sorted(path.parent for path in homes.glob("*/ledger.jsonl")):
        row: Row = {"owner": home.name}
        try:
            found.append(row | _totals(home))
        except FedsplitError as error:
            found.append(row | {"error": str(error)})
    return found


def _totals(home: Path) -> Row:
    totals = Totals()
    for entry in read_ledger(home):
        totals.apply(entry)
    shown = [totals.exposure.summary(name) for name in totals.exposure.representations()]
    most = max(shown, key=lambda row: row.get("views", {}).get("max", 0), default={})
    return {
        "bytes": totals.bytes,
        "kinds": {kind: size for kind, (_, size) in totals.kinds.items()},
        "sessions": sum(run.sessions for run in totals.runs.values()),
        "tokens": sum(sum(run.tokens.values()) for run in totals.runs.values()),
        "texts": most.get("samples", 0),
        "views": most.get("views"),
        "cost": {unit: most[unit] for unit in ("eta", "epsilon", "nats") if unit in most},
        "guarantee": most.get("guarantee", ""),
        "budget": _budget(),
    }


def _budget() -> Row:
    path = os.environ.get(POLICY_VARIABLE)
    rules = Policy.load(Path(path)).rules if path else {}
    return {name: bound for name, bound in rules.items() if name.startswith("budget.")}
