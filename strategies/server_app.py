"""The Flower ServerApp: reads the settings and hands over to the strategy they name."""

from __future__ import annotations

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedsplit.registry import pick
from fedsplit.settings import read_settings
from fedsplit.wire.logs import join_flower_log

from . import STRATEGIES

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the configured strategy to its end.

    Raises:
        ConfigError: an unknown setting or strategy, or a value out of range.
    """
    join_flower_log()
    config = read_settings(dict(context.run_config))
    pick(STRATEGIES, config.strategy, "strategy")(grid, context, config)
