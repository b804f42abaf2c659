"""What is added up of a run's owners: weighted changes, their weight, counts and a loss."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedsplit.config import RunConfig
from fedsplit.errors import PrivacyError
from fedsplit.privacy.secure_aggregation.masks import NDArray
from fedsplit.privacy.secure_aggregation.quantisation import Quantiser
from fedsplit.privacy.secure_aggregation.roster import Occasion

LOSS_BOUND = 64.0  # nats: a mean loss beyond it counts as that
COUNTS = ("num-examples", "steps")


def occasion_of(config: RunConfig, run: int, number: int) -> Occasion:
    """Return what a round's masked sum belongs to: run, round and the settings of the sum."""
    secure = {k: v for k, v in config.to_flat().items() if k.startswith("secure.")}
    told = json.dumps({**secure, "strategy": config.strategy}, sort_keys=True)
    return Occasion(run, number, hashlib.sha256(told.encode()).digest())


def quantiser_of(config: RunConfig, owners: int) -> Quantiser:
    """Return how a sum of at most so many owners is quantised.

    Raises:
        ConfigError: it could wrap around.
    """
    secure = config.secure
    return Quantiser(secure.bits, owners, secure.bound, secure.most_targets)


@dataclass(frozen=True)
class Summed:
    """What a sum says of its owners.

    Attributes:
        owners: in the sum.
        weight: the sum of their weights (targets).
        changes: weighted mean of their changes, by name, float64.
        counts: sums of what they count.
        loss: their mean loss, weighted by targets; None where nobody reports one.
        error: bound on the error of each coordinate of ``changes``.
    """

    owners: int
    weight: int
    changes: dict[str, NDArray]
    counts: dict[str, int]
    loss: float | None
    error: float


@dataclass(frozen=True)
class Numbers:
    """How a round's numbers lie in one vector: weight, counts, loss and its weight, changes.

    Attributes:
        shapes: of what owners train, by name; changes lie in the order of the names.
    """

    shapes: Mapping[str, tuple[int, ...]]

    @property
    def size(self) -> int:
        """Length d of the vector."""
        return 3 + len(COUNTS) + sum(int(np.prod(s)) for s in self.shapes.values())

    def encode(
        self,
        quantiser: Quantiser,
        changes: Mapping[str, NDArray],
        metrics: Mapping[str, float],
        norm: float = 0.0,
    ) -> NDArray:
        """Return one owner's vector.

        Args:
            quantiser: of the round.
            changes: since the round's start, by name.
            metrics: with ``targets``, which weighs them; of ``num-examples``, ``steps`` and
                ``loss`` those that there are.
            norm: bound on the L2 norm of all changes together; 0 = off.

        Raises:
            PrivacyError: other names or shapes than the round's.
        """
        if {n: tuple(c.shape) for n, c in changes.items()} != dict(self.shapes):
            raise PrivacyError("changes to be added up: must be of the round's names and shapes")
        flat = [changes[name].astype(np.float64).ravel() for name in sorted(self.shapes)]
        whole = np.concatenate(flat) if flat else np.zeros(0)
        length = float(np.linalg.norm(whole))
        if norm and length > norm:
            whole *= norm / length
        weight = min(max(0, int(metrics["targets"])), quantiser.most_weight)
        loss = metrics.get("loss")
        told = 0 if loss is None else weight
        head = [quantiser.count(weight)]
        head += [quantiser.count(metrics.get(name, 0)) for name in COUNTS]
        head += [quantiser.count(told)]
        head += [quantiser.encode(np.array([loss or 0.0]), told, LOSS_BOUND)]
        return np.concatenate([*head, quantiser.encode(whole, weight)])

    def decode(self, quantiser: Quantiser, total: NDArray, owners: int) -> Summed:
        """Return what a sum of so many owners' vectors says.

        Raises:
            PrivacyError: nobody in it has any weight.
        """
        signed = quantiser.signed(total[: 3 + len(COUNTS)])
        weight, told = int(signed[0]), int(signed[1 + len(COUNTS)])
        if not weight > 0:
            raise PrivacyError(f"masked sum: weight={weight}: must be > 0")
        at = 3 + len(COUNTS)
        mean = quantiser.mean(total[at:], weight)
        changes: dict[str, NDArray] = {}
        begin = 0
        for name in sorted(self.shapes):
            shape = self.shapes[name]
            end = begin + int(np.prod(shape))
            changes[name] = mean[begin:end].reshape(shape)
            begin = end
        loss = float(quantiser.mean(total[at - 1 : at], told, LOSS_BOUND)[0]) if told > 0 else None
        counts = {name: int(signed[1 + i]) for i, name in enumerate(COUNTS)}
        return Summed(owners, weight, changes, counts, loss, quantiser.error(owners, weight))


def report_of(summed: Summed) -> dict[str, Any]:
    """Return the averages that a sum reports, as other rounds' are named."""
    found: dict[str, Any] = {"num-examples": summed.counts["num-examples"], "owners": {}}
    if summed.loss is not None:
        found["loss"] = summed.loss
    return found
