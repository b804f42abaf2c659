"""Choosing one row of a literal table by name; names of a package that load on first use.

Each family (mechanisms, attacks, strategies ...) is one dict in its package's ``__init__``.  There
are no decorators, no scanning and no dotted paths: the run config comes from the other party, so a
name may select only what the code lists.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TypeVar

from fedsplit.errors import ConfigError

T = TypeVar("T")


def pick(table: Mapping[str, T], name: str, kind: str) -> T:
    """Return ``table[name]``.

    Args:
        table: the family's literal table.
        name: the row asked for.
        kind: what a row is, for the message ("mechanism", "attack" ...).

    Raises:
        ConfigError: if there is no such row; the message lists the known names.
    """
    try:
        return table[name]
    except KeyError:
        known = ", ".join(sorted(table))
        raise ConfigError(f"{kind}={name!r}: must be one of {known}") from None


def lazy(package: str, modules: Mapping[str, tuple[str, ...]]) -> Callable[[str], object]:
    """Return a package's ``__getattr__`` that imports a name's module on first use (PEP 562).

    Args:
        package: the package's ``__name__``.
        modules: module below the package -> the public names that it defines.
    """
    homes = {name: module for module, names in modules.items() for name in names}

    def get(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return get
