"""One whole run in this process, with everything the server knew at its end."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord

from fedsplit.config import RunConfig
from strategies.rounds.recorder import Recorder
from strategies.split_tuning.run import build_parts, initial_arrays, keep_trained
from strategies.split_tuning.strategy import SplitTuning
from tests.strategies.local_grid import LocalGrid


@dataclass
class LocalRun:
    """A finished run."""

    grid: LocalGrid
    strategy: SplitTuning
    result: Any
    folder: Path
    server: dict[str, Any]

    @property
    def state(self) -> dict[str, torch.Tensor]:
        return self.strategy.parts.trainable.state()

    def captured(self) -> list[bytes]:
        """Every frame the owners sent, in the order in which each came."""
        frames = []
        for path in sorted((self.folder / "capture").glob("*.bin")):
            data = path.read_bytes()
            at = 0
            while at < len(data):
                length = int.from_bytes(data[at : at + 8], "little")
                frames.append(data[at + 8 : at + 8 + length])
                at += 8 + length
        return frames


def run_local(config: RunConfig, *, prepare: Any = None, **grid_options: Any) -> LocalRun:
    """Carry out the run; ``prepare(grid, strategy)`` may put obstacles in its way."""
    torch.manual_seed(0)
    folder = Path(config.output.dir)
    grid = LocalGrid(config, config.data.owners, **grid_options)
    recorder = Recorder(folder, capture=config.output.capture)
    parts, bottom = build_parts(config, grid.run_id, recorder)
    strategy = SplitTuning(config, parts)
    if prepare is not None:
        prepare(grid, strategy)
    initial: ArrayRecord = initial_arrays(config, bottom, parts.head)
    try:
        result = strategy.start(grid, initial, num_rounds=config.train.rounds)
        keep_trained(config, parts, result.arrays)
    finally:
        if parts.hub is not None:
            parts.hub.stop()
        recorder.close()
    recorder.transcript(strategy.store)
    server = json.loads((folder / "server.json").read_text())
    return LocalRun(grid, strategy, result, folder, server)
