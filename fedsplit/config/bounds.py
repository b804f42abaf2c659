"""A bound that several groups of settings use."""

from __future__ import annotations

from fedsplit.errors import check


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse a value that is not among ``allowed``.

    Raises:
        ConfigError: names the setting, its value and what it may be.
    """
    check(value in allowed, name, value, "one of " + ", ".join(allowed))
