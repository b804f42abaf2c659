"""What a rule's value may be: parsers from TOML values to bounds, which name what is wrong."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta
from typing import Any

from fedsplit.errors import check

DIGEST = re.compile(r"[0-9a-f]{64}")
Parse = Callable[[str, object], Any]
"""Name and TOML value -> bound; raises ``ConfigError`` for anything else."""


def number(low: float, high: float = math.inf, *, strict: bool = False) -> Parse:
    """Return a parser of finite numbers in a range, open below if ``strict``."""
    left, right = "(" if strict else "[", "]" if math.isfinite(high) else ")"
    bound = f"a number in {left}{low:g}, {high:g}{right}"

    def parse(name: str, value: object) -> float:
        ok = isinstance(value, int | float) and not isinstance(value, bool)
        check(ok and abs(value) < 1e300, name, value, bound)  # type: ignore[arg-type]
        found = float(value)  # type: ignore[arg-type]
        within = (low < found if strict else low <= found) and found <= high
        check(math.isfinite(found) and within, name, value, bound)
        return found

    return parse


def count(low: int) -> Parse:
    """Return a parser of integers of at least ``low``."""

    def parse(name: str, value: object) -> int:
        ok = isinstance(value, int) and not isinstance(value, bool) and low <= value < 2**63
        check(ok, name, value, f"an integer >= {low}")
        return int(value)  # type: ignore[call-overload, no-any-return]

    return parse


def names(pattern: re.Pattern[str], what: str, known: tuple[str, ...] = ()) -> Parse:
    """Return a parser of lists of words, each of a pattern and among ``known`` if given."""

    def parse(name: str, value: object) -> tuple[str, ...]:
        check(isinstance(value, list) and len(value) > 0, name, value, f"a list of {what}")
        for item in value:  # type: ignore[attr-defined]
            check(isinstance(item, str) and bool(pattern.fullmatch(item)), name, item, what)
            check(not known or item in known, name, item, "one of " + ", ".join(known))
        return tuple(value)  # type: ignore[arg-type]

    return parse


def flag(name: str, value: object) -> bool:
    """Return true or false."""
    check(isinstance(value, bool), name, value, "true or false")
    return bool(value)


def digest(name: str, value: object) -> str:
    """Return a SHA-256 in hexadecimal digits."""
    ok = isinstance(value, str) and bool(DIGEST.fullmatch(value))
    check(ok, name, value, "64 hexadecimal digits (fedsplit owner digest prints them)")
    return str(value)


def path(name: str, value: object) -> str:
    """Return a file's path."""
    check(isinstance(value, str) and 0 < len(value) <= 4096, name, value, "the path of a file")
    return str(value)


def moment(end: bool) -> Parse:
    """Return a parser of dates and times; a whole day ends where ``end`` is meant."""

    def parse(name: str, value: object) -> datetime:
        if isinstance(value, datetime):
            check(value.tzinfo is not None, name, str(value), "a time with an offset, such as Z")
            return value.astimezone(UTC)
        check(isinstance(value, date), name, value, "a TOML date or time, such as 2026-12-31")
        assert isinstance(value, date)
        day = datetime.combine(value, time(), UTC)
        return day + timedelta(days=1) if end else day  # "not after" a day means its end

    return parse
