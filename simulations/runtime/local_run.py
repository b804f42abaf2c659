"""One whole federated run in this process: real strategy, owners and sessions, no Flower runtime.

For sweeps, where starting SuperLink, Ray and actors per cell would take longer than the cell.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, RecordDict

from fedsplit.config import RunConfig
from fedsplit.registry import pick
from simulations.runtime.federated import everyone_config, owner_environment, read_server
from simulations.runtime.local_grid import LocalGrid
from strategies import STRATEGIES

LOCAL_RUN_ID = 1


def run_in_process(config: RunConfig, folder: Path) -> tuple[RunConfig, dict[str, Any]]:
    """Run ``config`` to its end; return it as it was run, and the content of ``server.json``.

    The server's files go to ``folder/server``, whatever ``output.dir`` says.

    Raises:
        FedsplitError: the run failed, or a setting or the model cannot be used.
    """
    server, homes = folder / "server", folder / "homes"
    shutil.rmtree(server, ignore_errors=True)
    config = everyone_config(config, server)
    with environment(owner_environment(homes)):
        try:
            run_strategy(config, LocalGrid(config, config.data.owners, run_id=LOCAL_RUN_ID))
        finally:
            shutil.rmtree(homes, ignore_errors=True)
    return config, read_server(server)


def run_strategy(config: RunConfig, grid: LocalGrid) -> None:
    """Run the strategy of ``config`` over the owners of ``grid`` to its end.

    Raises:
        FedsplitError: the run failed.
    """
    torch.manual_seed(config.seed)
    context = Context(grid.run_id, 0, {}, RecordDict(), dict(config.to_flat()))
    pick(STRATEGIES, config.strategy, "strategy")(grid, context, config)


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Set variables of this process while the context lasts."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
