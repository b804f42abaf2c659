"""The cases, by name, and how one is played."""

from __future__ import annotations

import importlib
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedsplit.registry import pick
from simulations.adversary.context import Field
from simulations.adversary.reading import Row
from simulations.adversary.server import LyingServer

# name -> module of simulations.adversary.cases; a new case is a file there and a row here
CASES: dict[str, str] = {
    "honest": "honest",
    "subtraction": "subtraction",
    "bounds": "bounds",
    "template": "template",
    "views": "views",
    "labels": "labels",
    "errors": "errors",
    "strategies": "strategy_names",
    "offsite": "offsite",
    "accounting": "accounting",
    "resources": "resources",
    "masked-sums": "masked_sums",
}


def play(name: str, *, quick: bool = False, real: bool = False) -> list[Row]:
    """Return the rows of one case, played against new owners in a temporary folder.

    Args:
        name: a row of :data:`CASES`.
        quick: spend only what a test's seconds allow.
        real: use SST-2's sentences where they are there.

    Raises:
        ConfigError: no such case.
    """
    module = importlib.import_module(f"simulations.adversary.cases.{pick(CASES, name, 'case')}")
    with tempfile.TemporaryDirectory() as folder, LyingServer() as server, quiet():
        rows: list[Row] = module.play(Field(Path(folder), server, quick, real))
    return rows


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the owners' logs off the terminal: they refuse a great deal, which is no news here."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
