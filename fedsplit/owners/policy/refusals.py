"""Error texts that an owner tells the server when it gives up: types from one table, never values.

Messages of errors name values, which helps whoever owns the data; what the other party is told is
its type's sentence below, and for a policy the names of the rules.  The whole message, with its
traceback where it was not foreseen, is in the owner's own log.
"""

from __future__ import annotations

from fedsplit.errors import (
    ConfigError,
    DataError,
    DeadlineError,
    FedsplitError,
    FrameError,
    LedgerError,
    ModelError,
    PolicyError,
    PrivacyError,
    SessionError,
    TokenError,
    UnsupportedModelError,
    WireError,
)
from fedsplit.owners.home import in_simulation
from fedsplit.owners.policy.rule_table import policy_rules

_LOG = "its own log says why"
# Everything that an owner ever tells of an error, by type; subclasses are told as their base.
TOLD: dict[type[FedsplitError], str] = {
    ConfigError: f"a setting of the run, or of this owner's node, cannot be used; {_LOG}",
    UnsupportedModelError: f"this model cannot be used at this owner; {_LOG}",
    ModelError: f"files or weights of the server cannot be used at this owner; {_LOG}",
    DataError: f"this owner's data cannot be used; {_LOG}",
    PrivacyError: f"a privacy mechanism cannot be used as asked at this owner; {_LOG}",
    PolicyError: f"this owner's policy refuses; {_LOG}",
    LedgerError: f"this owner's ledger cannot be written; nothing leaves; {_LOG}",
    FrameError: f"a frame of the server cannot be used; {_LOG}",
    TokenError: f"a session token cannot be used; {_LOG}",
    DeadlineError: "the server did not answer in time",
    SessionError: f"this owner gave up; {_LOG}",
    WireError: f"a message of the server cannot be used; {_LOG}",
}


def tellable(error: Exception) -> FedsplitError:
    """Return the error that the server may be told instead of ``error``.

    A policy's refusal names its rules, which are words of a fixed list, and neither what was asked
    nor what is allowed.  An error that nobody foresaw is told as :class:`SessionError`.  A local
    simulation has nothing to hide and is told all of its own errors.
    """
    if in_simulation():
        if isinstance(error, FedsplitError):
            return error
        return SessionError(f"{type(error).__name__} at the owner: {error}")
    for kind in type(error).__mro__:
        if kind in TOLD:
            return kind(TOLD[kind] + _rules(error))
    return SessionError(TOLD[SessionError])


def _rules(error: Exception) -> str:
    known = policy_rules()
    named = [r for r in getattr(error, "rules", ()) if r in known]
    return f" (rules: {', '.join(named)})" if named else ""
