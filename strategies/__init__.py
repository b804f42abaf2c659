"""The model owner's side: Flower strategies that hold the top model or the full one.

The wheel carries this folder as ``fedsplit.strategies``.  Names are resolved on first use.

| folder | what it holds |
| --- | --- |
| ``split_tuning`` | the top model at the server, one step for a cohort of owners |
| ``offsite_tuning`` | the full model at the server, adapters averaged and plugged in |
| ``serving`` | a tuned top that answers |
| ``sessions`` | streams from owners, authentication, received representations |
| ``rounds`` | sampling, replies, averaging, lineage, saved state |
| ``telemetry`` | status page, metrics, event files |

A ServerApp of your own around a strategy::

    >>> from flwr.serverapp import ServerApp
    >>> from flwr.serverapp.strategy import FedAdam
    >>> from fedsplit.strategies import OffsiteTuning, SplitTuning

    >>> app = ServerApp()
    >>> @app.main()
    ... def main(grid, context):
    ...     with SplitTuning.open(context, rounds=5, output_dir="out") as strategy:
    ...         result = strategy.start(grid)

    >>> offsite_app = ServerApp()
    >>> @offsite_app.main()
    ... def main(grid, context):
    ...     with OffsiteTuning.open(context, averaging=FedAdam()) as strategy:
    ...         result = strategy.start(grid)

``open`` takes a Flower context (its run config), a :class:`~fedsplit.config.RunConfig`, flat
settings, or nothing; every setting can be given as a keyword, ``k=2`` or ``split_k=2`` for
``split.k`` (see :func:`fedsplit.strategies.settings.run_config`)::

    >>> from fedsplit.strategies.settings import run_config
    >>> config = run_config(model="gpt2", task="causal-lm", k=2, privacy_clip=1.0, seed=7)
    >>> config.model.name, config.split.k, config.privacy.clip
    ('gpt2', 2, 1.0)

Owners read the run config that Flower hands them, so what they have to know (privacy, labels, batch
sizes) stands there; keywords are the server's own.  ``averaging=`` is any Flower strategy or
wrapper (FedAdam, Krum, differential privacy ...): its ``aggregate_train`` averages what owners
train.  The strategies are Flower strategies, so a wrapper may also stand around them.

``STRATEGIES`` is the table that the project's own ServerApp picks from; a new strategy is a file
here and one row below.

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
    from .split_tuning.strategy import SplitTuning

    with SplitTuning.open(config, run_id=context.run_id) as strategy:
        strategy.start(grid)


def _offsite_tuning(grid: Grid, context: Context, config: RunConfig) -> None:
    from .offsite_tuning.strategy import OffsiteTuning

    with OffsiteTuning.open(config, run_id=context.run_id) as strategy:
        strategy.start(grid)


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
    {"offsite_tuning.strategy": ("OffsiteTuning",), "split_tuning.strategy": ("SplitTuning",)},
)
