"""What the losses of a run's classes are multiplied by in training (``train.class-weights``)."""

from __future__ import annotations

import torch
from torch import Tensor

from fedsplit.config import RunConfig
from fedsplit.errors import check
from fedsplit.tasks.base import CrossEntropy, Task

BALANCED = "balanced"
WEIGHTS = (0.01, 100.0)
"""Bounds of a class's weight."""
_NAME = "train.class-weights"


def class_weights(config: RunConfig, kind: type[Task]) -> tuple[float, ...]:
    """Return the weights of a run's classes, in order; empty where the settings give none.

    ``balanced`` gives none either: every owner takes its own (:func:`balanced_weights`).

    Raises:
        ConfigError: not one number for each class, one out of range, a task without classes, or
            ``balanced`` beside DP-SGD.
    """
    text = config.train.class_weights
    if not text:
        return ()
    good = issubclass(kind, CrossEntropy) and kind.labelled
    check(good, _NAME, text, f"empty with model.task={kind.name}, which has no classes")
    check(not config.labels.debias, _NAME, text, "empty with labels.debias")
    least, most = WEIGHTS
    if text == BALANCED:
        private = config.dp.noise_multiplier > 0
        told = "numbers with dp.noise-multiplier, which bounds what one text changes: a count of "
        check(not private, _NAME, text, told + "classes would change every text's gradient")
        return ()
    bound = (
        f"{config.model.labels} numbers in [{least:g}, {most:g}], separated by commas, or "
        f"{BALANCED!r}"
    )
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    good = len(found) == config.model.labels and all(least <= w <= most for w in found)
    check(good, _NAME, text, bound)
    return found


def balanced_weights(targets: Tensor, classes: int) -> list[float]:
    """Return each class's weight n / (C' n_c), cut to ``WEIGHTS``; 1 for a class without targets.

    Of n targets n_c are of class c, and C' classes have any.  Before the cut this is scikit-learn's
    ``compute_class_weight("balanced")`` (after King and Zeng, Logistic regression in rare events
    data, 2001): every class that there is counts as much as any other.

    Args:
        targets: classes' indices, (n,) int64.
        classes: C, the length of the result.
    """
    counts = targets.bincount(minlength=classes).double()
    there = counts > 0
    found = torch.ones_like(counts)
    found[there] = len(targets) / (there.sum() * counts[there])
    return [float(w) for w in found.clamp(*WEIGHTS)]
