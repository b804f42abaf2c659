"""Flower's robust strategies, given the owners' changes instead of their weights.

Flower's Krum computes distances as ``|x|^2 + |y|^2 - 2 x y`` in float32.  Of whole weights, which
are hundreds of times longer than a round's changes, nothing but rounding is left; of the changes
themselves it is exact.  A median or trimmed mean is the same either way.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import (
    Bulyan,
    FedAvg,
    FedMedian,
    FedTrimmedAvg,
    Krum,
    MultiKrum,
    Strategy,
)

from fedsplit.errors import ModelError
from fedsplit.wire.messages import weights_record

Aggregate = tuple[ArrayRecord | None, MetricRecord | None]


class OnChanges(FedAvg):
    """Mixin: lets a Flower strategy aggregate changes, and adds the result to the current weights.

    Attributes:
        current_arrays: the weights that owners began the round with.
    """

    current_arrays = ArrayRecord()

    @abstractmethod
    def fewest(self) -> int:
        """Return how many owners the rule needs for its guarantee."""

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregate:
        """Aggregate the replies' changes.

        Raises:
            ModelError: fewer replies than the rule needs.
        """
        found = list(replies)
        if len(found) < self.fewest():
            raise ModelError(
                f"{type(self).__name__}: {len(found)} owners' updates: must be >= {self.fewest()} "
                "(robust.malicious)"
            )
        self._told(len(found))
        start = {name: array.numpy() for name, array in self.current_arrays.items()}
        for reply in found:
            (key,) = reply.content.array_records
            sent = reply.content.array_records[key]
            changes = {n: a.numpy() - start[n] for n, a in sent.items()}
            reply.content[key] = weights_record(changes)
        arrays, metrics = super().aggregate_train(server_round, found)
        if arrays is None:
            return None, metrics
        moved = {n: (start[n] + a.numpy()).astype(np.float32) for n, a in arrays.items()}
        return weights_record(moved), metrics

    def _told(self, count: int) -> None:
        """Called with the number of replies before they are aggregated."""


class RobustKrum(OnChanges, Krum):
    """Flower's Krum (Blanchard et al., arXiv 1703.02757): the one change closest to its peers."""

    def fewest(self) -> int:
        """Return 2 f + 3."""
        return 2 * int(self.num_malicious_nodes) + 3


class RobustMultiKrum(OnChanges, MultiKrum):
    """Flower's MultiKrum: the mean of the n - f changes closest to their peers."""

    def fewest(self) -> int:
        """Return 2 f + 3."""
        return 2 * int(self.num_malicious_nodes) + 3

    def _told(self, count: int) -> None:
        self.num_nodes_to_select = count - int(self.num_malicious_nodes)


class RobustBulyan(OnChanges, Bulyan):
    """Flower's Bulyan (El Mhamdi et al., arXiv 1802.07927)."""

    def fewest(self) -> int:
        """Return 4 f + 3."""
        return 4 * int(self.num_malicious_nodes) + 3


class RobustTrimmedAvg(OnChanges, FedTrimmedAvg):
    """Flower's trimmed mean (Yin et al., arXiv 1803.01498): f values less at either end.

    Args:
        malicious: f.
        options: Flower's.
    """

    def __init__(self, malicious: int, **options: Any) -> None:
        super().__init__(**options)
        self._malicious = malicious

    def fewest(self) -> int:
        """Return 2 f + 1."""
        return 2 * self._malicious + 1

    def _told(self, count: int) -> None:
        self.beta = min((self._malicious + 0.5) / count, 0.4999)  # Flower rounds down


class RobustMedian(OnChanges, FedMedian):
    """Flower's coordinate-wise median (Yin et al., arXiv 1803.01498)."""

    def fewest(self) -> int:
        """Return 1: a median has no parameter."""
        return 1


RULES: dict[str, Callable[[int, str], Strategy]] = {
    "fedmedian": lambda f, key: RobustMedian(weighted_by_key=key),
    "fedtrimmedavg": lambda f, key: RobustTrimmedAvg(f, weighted_by_key=key),
    "krum": lambda f, key: RobustKrum(weighted_by_key=key, num_malicious_nodes=f),
    "multikrum": lambda f, key: RobustMultiKrum(weighted_by_key=key, num_malicious_nodes=f),
    "bulyan": lambda f, key: RobustBulyan(weighted_by_key=key, num_malicious_nodes=f),
}
"""Rule -> strategy for f liars whose metrics are weighted by a key."""
