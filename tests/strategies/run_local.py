"""One whole run in this process, with everything the server knew at its end."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedsplit.config import RunConfig
from fedsplit.wire.frames import KIND_AT, Kind
from strategies.split_tuning.strategy import SplitTuning
from tests.strategies.local_grid import LocalGrid

FROM_SERVER = {Kind.WELCOME, Kind.FILE, Kind.START, Kind.LOGITS, Kind.HIDDEN_GRAD, Kind.BYE}


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
        return self.strategy.parts.model.trainable.state()

    def captured(self) -> list[bytes]:
        """Every frame the owners sent, in the order in which each came."""
        frames = []
        for path in sorted((self.folder / "capture").glob("*.bin")):
            data = path.read_bytes()
            at = 0
            while at < len(data):
                length = int.from_bytes(data[at : at + 8], "little")
                frame = data[at + 8 : at + 8 + length]
                if frame[KIND_AT] not in FROM_SERVER:
                    frames.append(frame)
                at += 8 + length
        return frames


def run_local(config: RunConfig, *, prepare: Any = None, **grid_options: Any) -> LocalRun:
    """Carry out the run; ``prepare(grid, strategy)`` may put obstacles in its way."""
    torch.manual_seed(0)
    folder = Path(config.output.dir)
    grid = LocalGrid(config, config.data.owners, **grid_options)
    with SplitTuning.open(config, run_id=grid.run_id) as strategy:
        if prepare is not None:
            prepare(grid, strategy)
        result = strategy.start(grid)
    server = json.loads((folder / "server.json").read_text())
    return LocalRun(grid, strategy, result, folder, server)
