"""Bytes and seconds as a person reads them."""

from __future__ import annotations


def size(count: float) -> str:
    """Return a number of bytes as text."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def duration(seconds: float) -> str:
    """Return seconds as text."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


SHARES = ("accuracy", "accuracy-norm", "f1", "recall", "precision")
NAMES = {
    "mcc": "Matthews' correlation",
    "auc": "area under the ROC curve",
    "auc-error": "the area is known within",
    "pearson": "Pearson's correlation",
    "spearman": "Spearman's correlation",
    "spearman-error": "Spearman's is known within",
    "r2": "R squared",
    "rmse": "root mean square error",
    "choice-accuracy-norm": "choice accuracy by mean likelihood",
}


def score_name(name: str) -> str:
    """Return a score's name as a person reads it."""
    return NAMES.get(name, name.replace("-f1", " F1").replace("-", " "))


def score(name: str, value: float | None) -> str:
    """Return a score as text: shares in per cent, perplexities and coefficients as they are."""
    if value is None:
        return "not measured"
    if name.endswith(SHARES):
        return f"{100 * value:.1f} %"
    return f"{value:.2f}" if abs(value) > 1 else f"{value:.3f}"
