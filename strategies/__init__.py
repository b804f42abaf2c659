"""The model owner's side: Flower strategies that hold the top model, and the ServerApp.

``STRATEGIES`` is the family's table; a new strategy is a file here and one row below.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flwr.app import Context
    from flwr.serverapp import Grid

    from fedsplit.config import RunConfig


def _split_tuning(grid: Grid, context: Context, config: RunConfig) -> None:
    from .split_tuning.run import run

    run(grid, context, config)


def _offsite_tuning(grid: Grid, context: Context, config: RunConfig) -> None:
    from .offsite_tuning.run import run

    run(grid, context, config)


def _serving(grid: Grid, context: Context, config: RunConfig) -> None:
    from .serving.run import run

    run(grid, context, config)


# A row is a function that carries out one whole run.
STRATEGIES: dict[str, Callable[[Grid, Context, RunConfig], None]] = {
    "offsite-tuning": _offsite_tuning,
    "serving": _serving,
    "split-tuning": _split_tuning,
}
