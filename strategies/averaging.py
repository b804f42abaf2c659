"""Which Flower strategy averages what owners return; their ``aggregate_train`` does the work."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import ArrayRecord
from flwr.serverapp.strategy import (
    FedAdam,
    FedAvg,
    FedMedian,
    FedTrimmedAvg,
    Krum,
    Strategy,
)

from fedsplit.registry import pick

WEIGHT = "targets"  # an owner's tokens, so that the average of losses is the loss on all tokens

AVERAGINGS: dict[str, Callable[[], Strategy]] = {
    "fedadam": lambda: FedAdam(weighted_by_key=WEIGHT, eta=1e-3, tau=1e-8),
    "fedavg": lambda: FedAvg(weighted_by_key=WEIGHT),
    "fedmedian": lambda: FedMedian(weighted_by_key=WEIGHT),
    "fedtrimmedavg": lambda: FedTrimmedAvg(weighted_by_key=WEIGHT, beta=0.2),
    "krum": lambda: Krum(weighted_by_key=WEIGHT, num_malicious_nodes=1),
}


def make_averaging(name: str) -> Strategy:
    """Return the Flower strategy of that name.

    Raises:
        ConfigError: an unknown name.
    """
    return pick(AVERAGINGS, name, "offsite.averaging")()


def remember(averaging: Strategy, arrays: ArrayRecord) -> None:
    """Tell a strategy that steps from the current weights (FedAdam) what they are."""
    if hasattr(averaging, "current_arrays"):
        averaging.current_arrays = {name: array.numpy() for name, array in arrays.items()}
