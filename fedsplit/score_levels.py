"""Area under the ROC curve of a two-class model from counts: how many texts have which score.

Scores (differences of the two logits) are sorted into fixed levels, and each class's texts are
counted by level.  The area is the share of pairs, one text of each class, that the scores order
rightly; of two texts in one level it cannot be told which is higher, so such pairs count half and
the area is known up to half their share.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from fedsplit.sums import Family

LEVELS = 64
RANGE = 12.0  # nats: scores beyond it are in the outer levels
FAMILY = Family("levels", (2, LEVELS), all_targets=True)


def to_report(classes: npt.NDArray[np.int64], scores: npt.NDArray[np.float64]) -> dict[str, float]:
    """Return counts (class, level) as numbers of a report; zeros are left out.

    Args:
        classes: (N,) 0 or 1.
        scores: (N,) logit of class 1 less that of class 0.
    """
    edges = np.linspace(-RANGE, RANGE, LEVELS - 1)
    levels = np.searchsorted(edges, scores, side="right")
    pairs, counts = np.unique(np.stack([classes, levels]), axis=1, return_counts=True)
    return {
        f"{FAMILY.name}-{label}-{level}": float(count)
        for (label, level), count in zip(pairs.T.tolist(), counts.tolist(), strict=True)
    }


def area(sums: Mapping[str, float]) -> tuple[float, float] | None:
    """Return (area under the ROC curve, largest distance from that of the scores themselves).

    None where one of the classes has no text, or nothing was counted.
    """
    table = np.zeros((2, LEVELS))
    for at, value in FAMILY.of(sums).items():
        table[at] += value
    negative, positive = table
    pairs = negative.sum() * positive.sum()
    if not pairs:
        return None
    below = np.cumsum(negative) - negative
    ties = float((positive * negative).sum())
    return float((positive * below).sum() + ties / 2) / pairs, ties / 2 / pairs
