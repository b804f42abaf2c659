"""Scores of a classifier from counts alone: how many samples of class i were taken for class j.

Counts add up over owners, so these scores are those of all predictions together, and nobody needs
anybody's rows.  They equal scikit-learn's on the pooled predictions (``zero_division=0``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from fedsplit.sums import Family

Counts = npt.NDArray[np.int64]

MOST_CLASSES = 32  # whose counts are reported: C * C numbers at most
LEAST_TEXTS = 20
LEAST_TAKEN = 5  # texts taken for a class, of every class that any is taken for
FAMILY = Family("confusion", (MOST_CLASSES, MOST_CLASSES), all_targets=True)


def is_count(key: str) -> bool:
    """Whether a number of a report is one of these counts."""
    return FAMILY.has(key)


def to_report(counts: Counts) -> dict[str, float]:
    """Return counts (C, C), row = true class, as numbers of a report; zeros are left out."""
    rows, columns = counts.nonzero()
    return {
        f"confusion-{i}-{j}": float(counts[i, j])
        for i, j in zip(rows.tolist(), columns.tolist(), strict=True)
    }


def of_reports(reports: Sequence[Mapping[str, float]], classes: int = 0) -> Counts:
    """Return the sum of several reports' counts, (C, C) with C at least ``classes``."""
    told = [told for row in reports for told in FAMILY.of(row).items()]
    classes = max([classes, *(1 + max(at) for at, _ in told)])
    found = np.zeros((classes, classes), dtype=np.int64)
    for at, value in told:
        found[at] += int(value)
    return found


def coarse(report: Mapping[str, float]) -> bool:
    """Whether a report's counts are over so many texts that none of them stands alone.

    Whoever chooses the predictions chooses the columns of the table: a class that one text alone is
    taken for tells that text's label.  So every column that occurs must have ``LEAST_TAKEN`` texts,
    and the table ``LEAST_TEXTS``.  Groups of a few texts are still told their labels' sum, as any
    exact average tells it.
    """
    taken = of_reports([report]).sum(0)
    return bool(taken.sum() >= LEAST_TEXTS and (taken[taken > 0] >= LEAST_TAKEN).all())


def scores(counts: Counts) -> dict[str, float]:
    """Return accuracy, balanced accuracy, macro- and micro-F1 and Matthews' coefficient.

    Macro-F1 is over the classes that occur as a label or a prediction, balanced accuracy over those
    that occur as a label; Matthews' is the correlation R_K for any number of classes (Gorodkin,
    Comput. Biol. Chem. 28, 2004, equation 8), 0 where it is not defined.

    Args:
        counts: (C, C), row = true class, column = predicted.
    """
    table = counts.astype(np.float64)
    total, right = table.sum(), np.trace(table)
    true, predicted = table.sum(1), table.sum(0)
    if not total:
        return {}
    there = (true + predicted) > 0
    f1 = 2 * np.diag(table)[there] / (true + predicted)[there]
    spread = (total**2 - predicted @ predicted) * (total**2 - true @ true)
    matthews = (right * total - true @ predicted) / np.sqrt(spread) if spread > 0 else 0.0
    return {
        "accuracy": float(right / total),
        "balanced-accuracy": float(np.mean(recalls(counts)[true > 0])),
        "macro-f1": float(f1.mean()),
        "micro-f1": float(right / total),  # each sample has one label and one prediction
        "mcc": float(matthews),
    }


def recalls(counts: Counts) -> npt.NDArray[np.float64]:
    """Return the share of each class that was found, (C,); 0 for a class without samples."""
    true = counts.sum(1)
    return np.asarray(np.diag(counts) / np.maximum(true, 1), dtype=np.float64)
