"""What every strategy of this project adds to Flower's: a run's settings decide how it starts."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from flwr.app import ArrayRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedsplit.config import RunConfig

from .polling_grid import PollingGrid


class RunStrategy(Strategy):
    """A strategy of one run.

    Args:
        config: the run's settings.

    Attributes:
        rounds_done: rounds that are over, those of an interrupted start included.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.rounds_done = 0

    @property
    @abstractmethod
    def initial_arrays(self) -> ArrayRecord:
        """What owners train, as it is now: what a start begins with."""

    @property
    def rounds_left(self) -> int:
        """Rounds that a start has to do."""
        return max(0, self.config.train.rounds - self.rounds_done)

    def polling(self, grid: Grid) -> PollingGrid:
        """Return the grid that a start sends through."""
        return PollingGrid(grid)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float | None = None,
        *args: Any,
        **options: Any,
    ) -> Result:
        """Run as Flower does, but learn of every reply when it comes.

        Args:
            grid: Flower's.
            initial_arrays: what owners begin with; None: :attr:`initial_arrays`.
            num_rounds: rounds to do; None: :attr:`rounds_left`.
            timeout: seconds that a round may take; None: ``session.round-s``.
            args: as of Flower's ``Strategy.start``.
            options: likewise.
        """
        arrays = self.initial_arrays if initial_arrays is None else initial_arrays
        rounds = self.rounds_left if num_rounds is None else num_rounds
        seconds = self.config.session.round_s if timeout is None else timeout
        return super().start(self.polling(grid), arrays, rounds, seconds, *args, **options)
