"""The grid that tests run whole federations on."""

from simulations.runtime.local_grid import HANDLERS, LocalGrid

__all__ = ["HANDLERS", "LocalGrid"]
