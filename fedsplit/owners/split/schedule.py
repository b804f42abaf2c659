"""Which samples an owner uses at which step: the same for a session, a restart and a baseline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from fedsplit.config import TrainConfig
from fedsplit.data.batches import balanced_batches, epoch_batches
from fedsplit.errors import DataError
from fedsplit.privacy.secret import OwnerSecret
from fedsplit.seeding import derive_seed


def slot_order(secret: OwnerSecret, split: str, n: int) -> np.ndarray:
    """Return the owner's permutation of its ``n`` samples into slots.

    Slot numbers are visible to the server; a source sorted by label or time would tell both.
    """
    return np.argsort(secret.stream("fedsplit.slots", split, n).uniform(n), kind="stable")


def train_steps(
    n: int,
    config: TrainConfig,
    seed: int,
    owner: str,
    round_: int,
    classes: Tensor | None = None,
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
        classes: (n,) each sample's class, as far as anything may be derived from it; needed by
            ``train.sampler = "balanced"`` alone.

    Raises:
        DataError: the sampler needs classes and there are none.
    """
    labels = None
    if config.sampler == "balanced":
        if classes is None:
            raise DataError(
                "train.sampler='balanced': must be uniform, as texts are of no one class"
            )
        labels = classes.numpy()
    stream = derive_seed(seed, "batches", owner)
    per_epoch = -(-n // config.batch_size)
    steps = config.epochs * per_epoch
    if config.max_steps:
        steps = min(steps, config.max_steps)
    first = (round_ - 1) * steps
    batches: list[np.ndarray] = []
    epochs: list[int] = []
    for epoch in range(first // per_epoch, (first + steps - 1) // per_epoch + 1):
        if labels is None:
            order = epoch_batches(n, config.batch_size, stream, epoch)
        else:
            order = balanced_batches(labels, config.batch_size, stream, epoch)
        for index, batch in enumerate(order):
            if first <= epoch * per_epoch + index < first + steps:
                batches.append(batch)
                epochs.append(epoch)
    return batches, epochs


def passes_of(batches: Sequence[np.ndarray], n: int) -> list[float]:
    """Return what part of a pass over ``n`` samples each batch is, for the owner's budgets.

    Where samples are drawn more than once, passes are those of the sample that was drawn most: what
    gradients tell of a label adds up over its own draws.  So the parts up to any batch add up to
    the draws of that sample, or to the share of all samples, whichever is more.
    """
    drawn: Counter[int] = Counter()
    total, charged, most = 0, 0.0, 0
    found = []
    for batch in batches:
        drawn.update(int(slot) for slot in batch)
        total += len(batch)
        most = max(most, *(drawn[int(slot)] for slot in batch))
        now = max(total / n, float(most))
        found.append(now - charged)
        charged = now
    return found


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
