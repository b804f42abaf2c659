"""Regression: one number per text, or per pair of texts, within bounds that the parties agree on.

The bounds (``model.label-range``) are announced by the server and may be pinned by an owner.  They
say what a cell may hold, put labels on one scale for training ([-1, 1], whatever the unit is),
bound the gradient of one label, and fix the levels that counts are of.

What leaves in an evaluation, where the owner's policy lets counts leave (``reports.counts``):
the first and second moments of labels and predictions, from which Pearson's coefficient follows
exactly, and how many texts have a label near level i and a prediction near level j, from which
Spearman's follows within an error that is told beside it.  Whoever knows the predictions (the
server, with the head) reads labels of held-out texts off these counts to half a level.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsplit.config import ModelConfig, RunConfig
from fedsplit.data.label_column import LabelColumn
from fedsplit.data.labels import HIDDEN, class_name, is_missing
from fedsplit.data.table import Table
from fedsplit.errors import ConfigError, DataError, check
from fedsplit.rank_counts import rank_correlation, spearman
from fedsplit.sums import Family
from fedsplit.tasks.base import Task

OWN = "label-range"
TERMS = "numbers"
"""First of what the parties agree on, before both ends of the range."""
MOST = 3.0
"""Bound on a score; labels are within [-1, 1]."""
STEPS = 50
"""Levels of a range, without the first: counts are of the nearest one."""
MOMENTS = Family("moment", (3, 3), whole=False)
LEVELS = Family("level", (STEPS + 1, STEPS + 1), all_targets=True)
READ_STEPS = 20
"""The same for readers of gradients: a label is read if its twentieth of the range is."""
STRATA = 5


def parse_range(text: str, setting: str) -> tuple[float, float]:
    """Return (least, largest) label of a setting such as ``0,5``.

    Raises:
        ConfigError: not two finite numbers, the first below the second.
    """
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        low = high = math.nan
    good = math.isfinite(low) and math.isfinite(high) and low < high
    check(good, setting, text, "the least and the largest label, such as 0,5")
    return low, high


@dataclass(frozen=True)
class NumberColumn(LabelColumn):
    """One number per cell, within bounds.

    Attributes:
        low: least label.
        high: largest label.
    """

    named: ClassVar[bool] = False
    low: float = -math.inf
    high: float = math.inf

    def read(self, table: Table, names: Sequence[str]) -> tuple[float, ...]:
        """Return the numbers.

        Raises:
            DataError: a cell is empty, no number or out of bounds; names the row.
        """
        found = []
        for row, cell in enumerate(table.labels):
            value, place = _number(cell), table.place(row)
            if value is None:
                empty = "; the cell is empty" if is_missing(class_name(cell)) else ""
                if isinstance(cell, str) and _COMMA.fullmatch(cell.strip()):
                    empty = "; a decimal comma is written as a point"
                raise DataError(f"{place}: label={cell!r:.80}: must be a number{empty}")
            if not self.low <= value <= self.high:
                hidden = " (-1: labels of public test splits are kept back so)"
                why = hidden if class_name(cell) == HIDDEN else ""
                raise DataError(
                    f"{place}: label={cell!r:.80}: must be in [{self.low:g}, {self.high:g}], the "
                    f"agreed range (model.label-range; node config {OWN}){why}"
                )
            found.append(value)
        return tuple(found)

    def is_labelled(self, table: Table) -> bool:
        """Whether a cell holds a number within the bounds."""
        values = map(_number, table.labels)
        return any(value is not None and self.low <= value <= self.high for value in values)

    def fault(self, label: object, names: Sequence[str]) -> str | None:
        """See :meth:`LabelColumn.fault`."""
        if type(label) is float and self.low <= label <= self.high:
            return None
        return f"a number in [{self.low:g}, {self.high:g}]"

    def strata(self, labels: Sequence[float]) -> tuple[int, ...]:
        """Return which fifth of the labels' own range each is in."""
        low, high = min(labels), max(labels)
        width = (high - low) / STRATA or 1.0
        return tuple(min(int((label - low) / width), STRATA - 1) for label in labels)

    def counts(self, labels: Sequence[float], names: Sequence[str]) -> list[tuple[str, int]]:
        """Return how many labels each fifth of their range has."""
        low, high = min(labels), max(labels)
        ends = [low + (high - low) * i / STRATA for i in range(STRATA + 1)]
        found = Counter(self.strata(labels))
        return [(f"{ends[i]:.3g} to {ends[i + 1]:.3g}", found[i]) for i in range(STRATA)]


class Regression(Task):
    """One number per text: mean squared error on labels scaled to [-1, 1].

    Predictions are cut to the range where they are reported or answered, never in the loss.
    """

    name: ClassVar[str] = "regression"
    words: ClassVar[str] = "numbers"
    head: ClassVar[str] = "sequence-classification"
    problem: ClassVar[str] = "regression"
    metric: ClassVar[str] = "spearman"
    terms_setting: ClassVar[str] = OWN
    answer_columns: ClassVar[tuple[str, ...]] = ("value",)

    def __init__(self, outputs: int | None = 1, low: float = -1.0, high: float = 1.0) -> None:
        super().__init__(1)
        self.low, self.high = low, high
        # A row is 2 (p - t) / B, with p within MOST and t within 1.
        self.row_bound = 2 * (MOST + 1)

    @classmethod
    def of(cls, model: ModelConfig) -> Regression:
        """See :meth:`Task.of`."""
        return cls(1, *parse_range(model.label_range, f"model.{OWN}"))

    @classmethod
    def check_settings(cls, config: RunConfig) -> None:
        """Refuse a run without a range of labels."""
        parse_range(config.model.label_range, f"model.{OWN}")

    @classmethod
    def outputs_of(cls, labels: int) -> int:
        """Return one."""
        return 1

    def announced(self, model: ModelConfig) -> tuple[str, ...]:
        """Return both ends of the range, after :data:`TERMS`."""
        ends = parse_range(model.label_range, f"model.{OWN}")
        return (TERMS, *(f"{end!r}" for end in ends))

    def agreed(self, model: ModelConfig, own: str) -> tuple[str, ...]:
        """Return both ends of the range, which an owner's own must equal."""
        announced = parse_range(model.label_range, f"model.{OWN}")
        if own.strip() and parse_range(own, f"node config {OWN}") != announced:
            raise ConfigError(
                f"model.label-range={model.label_range!r:.80}: must be this owner's own {OWN}: "
                f"{own.strip():.80}"
            )
        return self.announced(model)

    def column(self, agreed: Sequence[str]) -> LabelColumn:
        """Return one number per cell."""
        return NumberColumn(self.low, self.high)

    def tensor(self, labels: Sequence[Any], places: Sequence[str]) -> Tensor:
        """Return the labels scaled to [-1, 1], (N,) float32."""
        for place, label in zip(places, labels, strict=True):
            if not self.low <= float(label) <= self.high:
                raise DataError(f"{place}: label={label}: must be in [{self.low:g}, {self.high:g}]")
        values = torch.tensor([float(label) for label in labels], dtype=torch.float64)
        return (2 * (values - self.low) / (self.high - self.low) - 1).float()

    def bounded(self, scores: Tensor) -> Tensor:
        """Return scores within ``MOST`` of 0."""
        if float(scores.detach().abs().max()) <= MOST:
            return scores
        return scores.clamp(-MOST, MOST)

    def losses(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Return squared differences on the scale of [-1, 1], (N,)."""
        return (scores[:, 0].float() - targets).square()

    def unexplained(self, rows: Tensor, scores: Tensor) -> Tensor:
        """See :meth:`Task.unexplained`: how far the label p - row / 2 is off [-1, 1], doubled."""
        label = scores.clamp(-MOST, MOST) - rows / 2  # (N, 1)
        return 2 * (label.abs() - 1).clamp_min(0.0)[:, 0]

    def families(self) -> tuple[Family, ...]:
        """Return moments (powers of label and prediction) and counts (their nearest levels)."""
        return (MOMENTS, LEVELS)

    def count(
        self, scores: Tensor, targets: Tensor, parts: Sequence[int], about: object = None
    ) -> dict[str, float]:
        """Return sums of powers, on the scale of [-1, 1], and counts of levels."""
        label, told = targets.double(), scores[:, 0].double().clamp(-1.0, 1.0)
        found = {
            f"moment-{i}-{j}": float((label**i * told**j).sum())
            for i in range(3)
            for j in range(3 - i)
            if i + j
        }
        pairs = zip(_levels(label, STEPS), _levels(told, STEPS), strict=True)
        for (i, j), times in Counter(pairs).items():
            found[f"level-{i}-{j}"] = float(times)
        return found

    def scores(self, sums: Mapping[str, float]) -> dict[str, Any]:
        """Return Pearson's and Spearman's coefficients, R squared and the root mean square error.

        Pearson's, R squared and the error (in the labels' own unit) are those of the pooled
        predictions; Spearman's is within ``spearman-error`` of theirs
        (:mod:`fedsplit.rank_counts`).  A coefficient that is not defined is 0.
        """
        table = {(i, j): times for (i, j), times in LEVELS.of(sums).items()}
        n = sum(table.values())
        if not n:
            return {}
        mean = {
            (i, j): sums.get(f"moment-{i}-{j}", 0.0) / n for i in range(3) for j in range(3 - i)
        }
        spread = mean[2, 0] - mean[1, 0] ** 2, mean[0, 2] - mean[0, 1] ** 2
        square = max(mean[2, 0] - 2 * mean[1, 1] + mean[0, 2], 0.0)
        pearson = 0.0
        if min(spread) > TINY:
            pearson = (mean[1, 1] - mean[1, 0] * mean[0, 1]) / math.sqrt(spread[0] * spread[1])
        spearman, error = rank_correlation(table)
        return {
            "pearson": min(max(pearson, -1.0), 1.0),
            "spearman": spearman,
            "spearman-error": error,
            "r2": 1 - square / spread[0] if spread[0] > TINY else 0.0,
            "rmse": math.sqrt(square) * (self.high - self.low) / 2,
        }

    def exact(self, scores: Tensor, targets: Tensor) -> dict[str, Any]:
        """Return Spearman's coefficient of the labels and the predictions, cut to the range."""
        told = scores[:, 0].double().clamp(-1.0, 1.0)
        return {"spearman": spearman(targets.double().numpy(), told.numpy())}

    def hypotheses(self, targets: Tensor) -> list[Tensor] | None:
        """Return every twentieth of the range."""
        ends = range(READ_STEPS + 1)
        return [torch.full_like(targets, 2 * i / READ_STEPS - 1) for i in ends]

    def truth(self, targets: Tensor) -> Tensor:
        """Return each label's nearest twentieth."""
        return torch.tensor(_levels(targets.double(), READ_STEPS), dtype=torch.int64)

    def answers(self, scores: Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return the predicted number, in the labels' own unit and within their range."""
        told = scores[:, 0].double().clamp(-1.0, 1.0)
        values = self.low + (told + 1) / 2 * (self.high - self.low)
        return [{"value": value} for value in values.tolist()]


TINY = 1e-12
_COMMA = re.compile(r"[+-]?\d+,\d+")


def _levels(values: Tensor, steps: int) -> list[int]:
    """Return the nearest of ``steps + 1`` levels of [-1, 1] for each value."""
    levels: list[int] = ((values + 1) / 2 * steps).round().long().clamp(0, steps).tolist()
    return levels


def _number(cell: object) -> float | None:
    """Return a cell's number; None where it holds none."""
    if isinstance(cell, bool) or not isinstance(cell, str | int | float):
        return None
    try:
        value = float(str(cell).replace("_", "?"))  # Python's own digit groups are none of a file's
    except (ValueError, OverflowError):
        return None
    return value if math.isfinite(value) else None
