"""Which samples go together in which step of an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedsplit.errors import DataError, check
from fedsplit.seeding import numpy_generator

Indices = npt.NDArray[np.int64]

CHUNK_BATCHES = 50


def epoch_batches(
    n: int,
    batch_size: int,
    seed: int,
    epoch: int,
    lengths: Sequence[int] | npt.NDArray[Any] | None = None,
) -> list[Indices]:
    """Return one epoch's batches of sample slots.

    Every slot 0 .. n - 1 is in exactly one batch, every batch but the last has ``batch_size``
    slots, and the same arguments give the same batches on every machine.

    With ``lengths``, samples of about one length go together: the shuffled slots are cut into
    chunks of ``CHUNK_BATCHES`` batches, each chunk is sorted by length, and the batches are
    shuffled again.  Most of the padding goes, and so does some of the randomness: which samples
    share a batch then depends on their lengths.  For DP-SGD use Poisson sampling instead; its
    accounting holds for neither form.

    Args:
        n: number of sample slots.
        batch_size: slots in a batch.
        seed: the run's root seed.
        epoch: number of the epoch, from 0; another epoch is another order.
        lengths: (n,) tokens of each sample, or none.

    Returns:
        ceil(n / batch_size) arrays, each (batch_size,) but for the last.

    Raises:
        ConfigError: if a number is out of its range.
        DataError: if ``lengths`` is not one length for each slot.
    """
    check(n >= 1, "n", n, ">= 1 (samples)")
    check(batch_size >= 1, "batch_size", batch_size, ">= 1 (samples)")
    check(epoch >= 0, "epoch", epoch, ">= 0")
    generator = numpy_generator(seed, "batches", epoch)
    order = generator.permutation(n).astype(np.int64)
    if lengths is None:
        return [order[start : start + batch_size] for start in range(0, n, batch_size)]
    length_of = np.asarray(lengths)
    if length_of.shape != (n,):
        raise DataError(f"lengths: shape={length_of.shape}: must be ({n},), one for each sample")
    chunk = batch_size * CHUNK_BATCHES
    full: list[Indices] = []
    partial: list[Indices] = []
    for start in range(0, n, chunk):
        slots = order[start : start + chunk]
        slots = slots[np.argsort(length_of[slots], kind="stable")]
        for first in range(0, len(slots), batch_size):
            batch = slots[first : first + batch_size]
            (full if len(batch) == batch_size else partial).append(batch)
    return [full[position] for position in generator.permutation(len(full))] + partial


def balanced_batches(
    classes: Sequence[int] | npt.NDArray[Any], batch_size: int, seed: int, epoch: int
) -> list[Indices]:
    """Return one epoch's batches with as many draws of each class, drawn anew for every batch.

    A batch of B slots has B / C' of each of the C' classes in expectation, rounded to a slot less
    or more; of a class with fewer slots than that all of them, and the others share the rest.  No
    slot is twice in a batch, and of one class's slots none is drawn again in an epoch before all
    were.  Batches are as many and as large as those of :func:`epoch_batches`, and the same
    arguments give the same batches on every machine.

    Args:
        classes: (n,) class of each slot.
        batch_size: slots in a batch.
        seed: the run's root seed.
        epoch: number of the epoch, from 0.

    Raises:
        ConfigError: if a number is out of its range.
    """
    labels = np.asarray(classes)
    n = len(labels)
    check(n >= 1, "n", n, ">= 1 (samples)")
    check(batch_size >= 1, "batch_size", batch_size, ">= 1 (samples)")
    check(epoch >= 0, "epoch", epoch, ">= 0")
    generator = numpy_generator(seed, "balanced batches", epoch)
    members = [np.flatnonzero(labels == c).astype(np.int64) for c in np.unique(labels)]
    waiting = [generator.permutation(own) for own in members]
    found = []
    for start in range(0, n, batch_size):
        counts = _dealt(min(batch_size, n - start), [len(own) for own in members], generator)
        batch = []
        for c, count in enumerate(counts):
            drawn, waiting[c] = waiting[c][:count], waiting[c][count:]
            if len(drawn) < count:
                again = generator.permutation(members[c])
                again = np.concatenate([again[~np.isin(again, drawn)], drawn])
                more = count - len(drawn)
                drawn, waiting[c] = np.concatenate([drawn, again[:more]]), again[more:]
            batch.append(drawn)
        found.append(generator.permutation(np.concatenate(batch)))
    return found


def _dealt(size: int, most: Sequence[int], generator: np.random.Generator) -> list[int]:
    """Return how many of ``size`` draws each class gets: alike in expectation, ``most`` at most."""
    shares = np.zeros(len(most))
    left, rest = sorted(range(len(most)), key=lambda c: most[c]), float(size)
    for done, c in enumerate(left):
        shares[c] = min(most[c], rest / (len(left) - done))
        rest -= shares[c]
    # Systematic sampling: whole numbers that sum to the size, each share kept in expectation.
    order = generator.permutation(len(most))
    ends = np.floor(np.cumsum(shares[order]) + generator.random())
    ends[-1] = size
    counts = np.zeros(len(most), dtype=np.int64)
    counts[order] = np.diff(ends, prepend=0.0)
    return [int(count) for count in counts]
