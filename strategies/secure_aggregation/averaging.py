"""What a masked sum's mean becomes: the averaging strategy's step, judged as every average is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedYogi,
    Strategy,
)
from torch import Tensor

from fedsplit.errors import ConfigError, PrivacyError
from fedsplit.privacy.secure_aggregation.numbers import Summed
from fedsplit.wire.messages import REPORT, WEIGHTS, weights_record

from ..rounds.aggregate import tensors
from ..rounds.averaging import WEIGHT, MeasuredFedAdam
from ..rounds.lineage_watch import LineageWatch

ONLY_SUMS = (
    "secure aggregation: owners' updates are not seen; the average alone is judged, and nobody can "
    "be named"
)

MEANS = (FedAvg, FedAvgM, FedAdagrad, FedAdam, FedYogi, MeasuredFedAdam)
"""Strategies whose step depends on the owners' mean alone."""


def check_mean(averaging: Strategy) -> None:
    """Check that a strategy can do with the mean of the owners' updates.

    Raises:
        ConfigError: it chooses among single updates, clips them, or adds noise for their number.
    """
    if type(averaging) not in MEANS:
        raise ConfigError(
            f"averaging={type(averaging).__name__}: must be one of "
            f"{', '.join(kind.__name__ for kind in MEANS)} with secure.aggregation, where the "
            "server sees no single update"
        )


def average_sum(
    watch: LineageWatch,
    row: dict[str, Any],
    summed: Summed,
    like: Message,
    averaging: Strategy,
    start: ArrayRecord,
    as_base: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict,
) -> ArrayRecord | None:
    """Return what owners go on from after a masked sum, or None where none is to be taken.

    Args:
        watch: the run's lineage gate.
        row: the round's, from ``watch.open_round``.
        summed: the owners' mean change.
        like: any of the round's replies: Flower's strategies average messages.
        averaging: Flower strategy, given the mean as one reply of the whole weight.
        start: what owners began the round with.
        as_base: what weights make of the base's own tensors.
    """
    weights = {
        name: (array.numpy().astype(np.float64) + summed.changes[name]).astype(np.float32)
        for name, array in start.items()
    }
    mean = copy.copy(like)
    report = MetricRecord({WEIGHT: float(summed.weight)})
    mean.content = RecordDict({WEIGHTS: weights_record(weights), REPORT: report})
    arrays = averaging.aggregate_train(row["round"], [mean])[0]
    if row["verdict"] != "off":
        row["note"] = ONLY_SUMS
    if arrays is not None and watch.judges_owners:
        found = tensors(arrays)
        watch.check_average(row, {**found, **as_base(found)}, {}, {})
    return arrays


def check_weight(counted: Sequence[float], most: int, summed: Summed) -> None:
    """Check the sum's weight against what the server itself counted of the owners in it.

    Args:
        counted: targets of each.
        most: weight of one owner at most.
        summed: what the sum says.

    Raises:
        PrivacyError: some owner put another weight into the sum.
    """
    due = sum(min(int(count), most) for count in counted)
    if summed.weight != due:
        raise PrivacyError(
            f"masked sum: weight={summed.weight}: must be {due}, the targets of the round's steps"
        )
