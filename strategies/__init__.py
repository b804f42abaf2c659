"""The model owner's side: Flower strategies that hold the top model, and the ServerApp.

``STRATEGIES`` is the family's table; a new strategy is a file here and one row below.  The wheel
carries this folder as ``fedsplit.strategies``.  Names are resolved on first use.

| folder | what it holds |
| --- | --- |
| ``split_tuning`` | the top model at the server, one step for a cohort of owners |
| ``offsite_tuning`` | the full model at the server, adapters averaged and plugged in |
| ``serving`` | a tuned top that answers |
| ``sessions`` | streams from owners, authentication, received representations |
| ``rounds`` | sampling, replies, averaging, lineage, saved state |
| ``telemetry`` | status page, metrics, event files |

Examples:
    >>> from fedsplit.strategies import STRATEGIES
    >>> sorted(STRATEGIES)
    ['offsite-tuning', 'serving', 'split-tuning']
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fedsplit.registry import lazy

if TYPE_CHECKING:
    from flwr.app import Context
    from flwr.serverapp import Grid

    from fedsplit.config import RunConfig

    from .offsite_tuning.strategy import OffsiteTuning
    from .split_tuning.strategy import SplitTuning


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

__all__ = ["STRATEGIES", "OffsiteTuning", "SplitTuning"]

__getattr__ = lazy(
    __name__,
    {"OffsiteTuning": "offsite_tuning.strategy", "SplitTuning": "split_tuning.strategy"},
)
