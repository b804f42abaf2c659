"""One round's average of what owners trained: each is judged and bounded, then the mean judged."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedsplit.config import RobustConfig
from fedsplit.errors import ModelError
from fedsplit.wire.messages import WEIGHTS

from .averaging import WEIGHT, adds_noise
from .contributions import bound_contributions
from .lineage_watch import LineageWatch

log = logging.getLogger(__name__)


def average_owners(
    watch: LineageWatch,
    row: dict[str, Any],
    replies: Sequence[Message],
    names: Mapping[int, str],
    averaging: Strategy,
    start: ArrayRecord,
    robust: RobustConfig,
    as_base: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict,
) -> ArrayRecord | None:
    """Return the average of the replies' weights, or None where none is to be taken.

    Args:
        watch: the run's lineage gate.
        row: the round's, from ``watch.open_round``; gets what the gate found, ``contributions``
            (what became of each owner's change) and ``charged`` (owner -> what is held against it).
        replies: with checked weights, see :func:`strategies.rounds.replies.check_weights`.
        names: node -> owner.
        averaging: Flower strategy whose ``aggregate_train`` averages.
        start: what owners began the round with.
        robust: bounds on what each of them contributes.
        as_base: what weights make of the base's own tensors (LoRA's factors, say); the same by
            default.
    """
    replies = with_equal_metrics(replies)
    nodes = {names[m.metadata.src_node_id]: m.metadata.src_node_id for m in replies}
    by_name = {names[m.metadata.src_node_id]: m for m in replies}
    judged = watch.judges_owners

    def judgeable(record: ArrayRecord) -> dict[str, Tensor]:
        """Return what a gate sees: the base's own tensors as they become, and those added."""
        found = tensors(record)
        return {**found, **as_base(found)}

    def as_updates(owners: Sequence[str]) -> dict[str, dict[str, Tensor]]:
        if not judged:
            return {}
        return {o: judgeable(by_name[o].content.array_records[WEIGHTS]) for o in owners}

    kept = watch.screen(row, as_updates(list(by_name)), nodes) if judged else list(by_name)
    if not adds_noise(averaging):
        kept = _bound({name: by_name[name] for name in kept}, row, start, robust)
    if not kept:
        return None
    mine = as_updates(kept)
    weights = {name: _weight(by_name[name]) for name in kept}
    try:
        copies = [_copied(by_name[name]) for name in kept]  # Flower's rules take them apart
        arrays = averaging.aggregate_train(row["round"], copies)[0]
    except ModelError as error:  # fewer owners than the rule needs
        log.warning("round %d: nothing averaged: %s", row["round"], error)
        row["note"] = str(error)
        return None
    if arrays is not None and judged:
        watch.check_average(row, judgeable(arrays), mine, weights, nodes)
    return arrays


def _bound(
    replies: Mapping[str, Message], row: dict[str, Any], start: ArrayRecord, robust: RobustConfig
) -> list[str]:
    """Bound the owners' contributions; return the names of those to be averaged."""
    arrays = {name: array.numpy() for name, array in start.items()}
    found = bound_contributions(replies, arrays, robust)
    row["contributions"] = {name: part.to_dict() for name, part in found.items()}
    row["charged"] = {name: part.reason for name, part in found.items() if part.reason}
    for name, reason in row["charged"].items():
        log.warning("round %d: %s: %s", row["round"], name, reason)
    if alike := [name for name, part in found.items() if part.alike is not None]:
        told = ", ".join(alike)
        log.warning(
            "round %d: changes more alike than the others' weigh less: %s", row["round"], told
        )
    return [name for name, part in found.items() if part.share > 0]


def _copied(reply: Message) -> Message:
    """Return a reply whose records are its own, of the same arrays."""
    made = copy.copy(reply)
    arrays = {key: ArrayRecord(dict(r)) for key, r in reply.content.array_records.items()}
    metrics = {key: MetricRecord(dict(r)) for key, r in reply.content.metric_records.items()}
    made.content = RecordDict({**arrays, **metrics})
    return made


def with_equal_metrics(replies: Sequence[Message]) -> list[Message]:
    """Return the replies with the numbers that all of them report.

    An owner's policy may keep averages back, and Flower averages nothing where keys differ.
    """
    records = [r for reply in replies for r in reply.content.metric_records.values()]
    common = set.intersection(*(set(record) for record in records)) if records else set()
    for record in records:
        for key in set(record) - common:
            del record[key]
    return list(replies)


def tensors(record: ArrayRecord) -> dict[str, Tensor]:
    """An array record's tensors by name."""
    return {name: torch.from_numpy(array.numpy().copy()) for name, array in record.items()}


def _weight(reply: Message) -> float:
    for record in reply.content.metric_records.values():
        value = record.get(WEIGHT)
        if isinstance(value, (int, float)) and value > 0:
            return float(value)
    return 1.0
