"""Which samples an owner uses at which step: the same for a session, a restart and a baseline."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedsplit.config import TrainConfig
from fedsplit.data.batches import epoch_batches
from fedsplit.privacy.secret import OwnerSecret
from fedsplit.seeding import derive_seed


def slot_order(secret: OwnerSecret, split: str, n: int) -> np.ndarray:
    """Return the owner's permutation of its ``n`` samples into slots.

    Slot numbers are visible to the server; a source sorted by label or time would tell both.
    """
    return np.argsort(secret.stream("fedsplit.slots", split, n).uniform(n), kind="stable")


def train_steps(
    n: int, config: TrainConfig, seed: int, owner: str, round_: int
) -> tuple[list[np.ndarray], list[int]]:
    """Return the batches of one round and the epoch each belongs to.

    Rounds continue where the last one ended: with ``max_steps`` shorter than an epoch, the next
    round takes the samples not used yet.

    Args:
        n: the owner's training samples.
        config: batch size, epochs and step bound.
        seed: the run's seed.
        owner: the owner's public name; owners' orders are independent.
        round_: server round, from 1.
    """
    per_epoch = -(-n // config.batch_size)
    steps = config.epochs * per_epoch
    if config.max_steps:
        steps = min(steps, config.max_steps)
    first = (round_ - 1) * steps
    batches: list[np.ndarray] = []
    epochs: list[int] = []
    for epoch in range(first // per_epoch, (first + steps - 1) // per_epoch + 1):
        order = epoch_batches(n, config.batch_size, derive_seed(seed, "batches", owner), epoch)
        for index, batch in enumerate(order):
            if first <= epoch * per_epoch + index < first + steps:
                batches.append(batch)
                epochs.append(epoch)
    return batches, epochs


def evaluation_steps(
    n: int, batch_size: int, together: Sequence[int] | None = None
) -> list[np.ndarray]:
    """Return all ``n`` samples in order, in batches twice the training size (no gradients kept).

    Args:
        n: samples.
        batch_size: of training.
        together: sizes of groups of samples, in order, that must share a batch; None: there are no
            groups.  A group larger than a batch is one.
    """
    size = 2 * batch_size
    if together is None:
        return [np.arange(at, min(at + size, n)) for at in range(0, n, size)]
    steps, first, count = [], 0, 0
    for group in together:
        if count and count + group > size:
            steps.append(np.arange(first, first + count))
            first, count = first + count, 0
        count += group
    return [*steps, np.arange(first, first + count)] if count else steps
