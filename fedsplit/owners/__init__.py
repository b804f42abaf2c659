"""The data owner's side of a session: bottom, private samples, noise secret, private-label loss.

What leaves passes the owner's policy and is written to its ledger.  Names are resolved on first
use.

| folder | what it holds |
| --- | --- |
| :mod:`~fedsplit.owners.policy` | the owner's rules, which no run config weakens |
| :mod:`~fedsplit.owners.ledger` | what has left: a hash-chained file |
| :mod:`~fedsplit.owners.split` | sessions of split tuning |
| :mod:`~fedsplit.owners.offsite` | adapters tuned on an emulator |
| :mod:`~fedsplit.owners.serving` | private inference |

Examples:
    >>> from fedsplit.config import RunConfig
    >>> from fedsplit.owners import Asked, Policy
    >>> policy = Policy({"noise": {"max_eta": 10.0}})
    >>> run = RunConfig.from_flat({"privacy.mechanism": "dchi", "privacy.eta": 25.0})
    >>> [str(breach) for breach in policy.settings_breaches(Asked(run.to_flat()))]
    ['noise.max_eta: asked 25, must be <= 10']
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedsplit.registry import lazy

if TYPE_CHECKING:
    from fedsplit.owners.home import OwnerHome
    from fedsplit.owners.ledger.chain import Ledger, read_ledger
    from fedsplit.owners.policy.rules import Asked, Breach, Policy

__all__ = [
    "Asked",
    "Breach",
    "Ledger",
    "OwnerHome",
    "Policy",
    "read_ledger",
]

__getattr__ = lazy(
    __name__,
    {
        "home": ("OwnerHome",),
        "ledger.chain": ("Ledger", "read_ledger"),
        "policy.rules": ("Asked", "Breach", "Policy"),
    },
)
