"""Every error fedsplit raises on purpose, so that callers can tell whose fault it was.

Messages carry the name of what was wrong, its value and the bound it broke:
``eta=-1.0: must be > 0 (1/length units of the representation)``.
"""

from __future__ import annotations

from collections.abc import Iterable


class FedsplitError(Exception):
    """Base of all errors raised on purpose by fedsplit."""


class ConfigError(FedsplitError, ValueError):
    """A setting is unknown, of the wrong type or out of its range."""


class UnsupportedModelError(FedsplitError):
    """The model's structure is not one that can be handled; says what was looked for and found."""


class ModelError(FedsplitError, ValueError):
    """Weights, tokenizer or bundle files are missing, damaged or do not fit together."""


class DataError(FedsplitError, ValueError):
    """A data set, column, label or partition is missing or malformed."""


class PrivacyError(FedsplitError, ValueError):
    """A privacy mechanism was given input on which its guarantee would not hold."""


class PolicyError(FedsplitError):
    """The owner's own policy forbids what was asked; names the rule.

    Args:
        message: names each rule, its bound and what was asked.
        rules: names of the broken rules.
    """

    def __init__(self, message: str, rules: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.rules = rules


class LedgerError(FedsplitError):
    """The owner's ledger cannot be written, or its chain is broken; then nothing may leave."""


class WireError(FedsplitError):
    """Base of everything that can go wrong between an owner and the server."""


class FrameError(WireError, ValueError):
    """A frame is malformed, over its bound, or carries NaN, wrong shapes or wrong dtypes."""


class TokenError(WireError):
    """A session token is foreign, expired, replayed or for another direction."""


class SessionError(WireError):
    """A session was lost, closed by the peer, or broke the protocol."""


class DeadlineError(SessionError):
    """The peer did not answer in time."""


class LineageError(FedsplitError):
    """Fingerprints cannot be compared, or a lineage record was tampered with."""


class AttackError(FedsplitError, ValueError):
    """An attack cannot be run on this transcript."""


class RunError(FedsplitError):
    """A simulation or deployment run failed; names the component and where its log is."""


def check(ok: bool, name: str, value: object, bound: str) -> None:
    """Raise ``ConfigError('name=value: must be bound')`` unless ``ok``.

    Raises:
        ConfigError: if ``ok`` is false.
    """
    if not ok:
        raise ConfigError(f"{name}={value!r}: must be {bound}")


def one_of(name: str, value: str, allowed: Iterable[str]) -> None:
    """Refuse a value that is not among ``allowed``.

    Raises:
        ConfigError: names the setting, its value and what it may be.
    """
    known = tuple(allowed)
    check(value in known, name, value, "one of " + ", ".join(known))
