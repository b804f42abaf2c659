"""Multi-label classification: any number of C classes per text, none included.

A cell holds a list (JSON lines, Parquet), or text with the classes' names between ``;`` or ``|``,
or a JSON list; an empty cell is a text of no class.

What leaves in an evaluation, where the owner's policy lets counts leave (``reports.counts``): for
each class how many held-out texts were rightly taken for it, wrongly taken for it, and missed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from fedsplit.config import RunConfig
from fedsplit.data.label_column import LabelColumn, NamedColumn
from fedsplit.data.labels import class_name, is_missing, numerals, unknown_class
from fedsplit.data.table import Cell, Table
from fedsplit.errors import DataError, check
from fedsplit.sums import Family
from fedsplit.tasks.base import MAX_LOGIT
from fedsplit.tasks.classification import NamedClasses

MOST_COUNTED = 256
"""Classes whose counts are reported."""
RIGHT, WRONG, MISSED = "right", "wrong", "missed"
_SEPARATORS = re.compile(r"[;|]")


class ClassSetColumn(NamedColumn):
    """Any number of classes per cell, by name (:func:`fedsplit.data.labels.class_name`)."""

    def names(self, tables: Sequence[Table], more: Callable[[], list[Table]]) -> tuple[str, ...]:
        """Return the agreed names, then those of other classes that occur, sorted.

        Without agreed names they are the source's own, or the numerals below the number of classes,
        where every class is one of these.
        """
        ordered = self.agreed or next((t.label_names for t in tables if t.label_names), ())
        known = {class_name(name) for name in ordered}
        rest = [*tables] if ordered else [*tables, *more()]
        found = {name for table in rest for cell in table.labels for name in _names(cell)} - known
        found = {name for name in found if not is_missing(name)}
        whole = numerals(self.classes)
        if not ordered and found <= set(whole):
            return whole
        return (*ordered, *sorted(found))

    def read(self, table: Table, names: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Return every row's classes, as ascending indices.

        Raises:
            DataError: a class outside ``names``, or a list that holds no name; names the row.
        """
        index = {class_name(name): position for position, name in enumerate(names)}
        found = []
        for row, cell in enumerate(table.labels):
            own = set()
            for name in _names(cell):
                if is_missing(name) and name not in index:
                    raise DataError(
                        f"{table.place(row)}: label={cell!r:.80}: must be names of classes"
                    )
                if name not in index:
                    raise unknown_class(table.place(row), name, names)
                own.add(index[name])
            found.append(tuple(sorted(own)))
        return tuple(found)

    def is_labelled(self, table: Table) -> bool:
        """Whether a row has a class; a column that is empty throughout is kept back."""
        known = {class_name(name) for name in self.agreed}
        return any(
            name in known or not (is_missing(name) or name == "-1")
            for cell in table.labels
            for name in _names(cell)
        )

    def fault(self, label: object, names: Sequence[str]) -> str | None:
        """See :meth:`LabelColumn.fault`."""
        good = isinstance(label, tuple) and all(
            type(index) is int and 0 <= index < len(names) for index in label
        )
        if good and isinstance(label, tuple) and list(label) == sorted(set(label)):
            return None
        return f"ascending integers from 0 to {len(names) - 1}"

    def outside(self, label: tuple[int, ...], names: Sequence[str], agreed: int) -> str | None:
        """See :meth:`LabelColumn.outside`."""
        return next((names[index] for index in label if index >= agreed), None)

    def strata(self, labels: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """Return one more than each row's first class, 0 for none."""
        return tuple(1 + label[0] if label else 0 for label in labels)

    def counts(
        self, labels: Sequence[tuple[int, ...]], names: Sequence[str]
    ) -> list[tuple[str, int]]:
        """Return how many rows each class has."""
        found = [0] * len(names)
        for label in labels:
            for index in label:
                found[index] += 1
        return list(zip(names, found, strict=True))


class MultiLabel(NamedClasses):
    """Any of C classes per text: the mean over classes of binary cross-entropy.

    A class is predicted where its logit is above 0; a text is right where all of its classes are.
    """

    name: ClassVar[str] = "multi-label"
    words: ClassVar[str] = "sets of classes"
    head: ClassVar[str] = "sequence-classification"
    problem: ClassVar[str] = "multi_label_classification"
    metric: ClassVar[str] = "micro-f1"
    answer_columns: ClassVar[tuple[str, ...]] = ("classes",)

    def __init__(self, outputs: int | None) -> None:
        super().__init__(outputs)
        classes = outputs or 1
        # A row is (sigmoid - y) / (C B).
        self.row_bound = classes**-0.5
        self.tolerance = 0.25 * classes**-0.5

    @classmethod
    def check_settings(cls, config: RunConfig) -> None:
        """See :func:`fedsplit.tasks.classification.check_names`; at most 10,000 classes."""
        super().check_settings(config)
        labels = config.model.labels
        check(labels <= 10_000, "model.labels", labels, "<= 10000 for multi-label")

    def column(self, agreed: Sequence[str]) -> LabelColumn:
        """Return sets of classes."""
        return ClassSetColumn(tuple(agreed), self.outputs or 0)

    def tensor(self, labels: Sequence[Any], places: Sequence[str]) -> Tensor:
        """Return 1 where a text is of a class and 0 elsewhere, (N, C) float32."""
        classes = self.outputs or 0
        found = torch.zeros(len(labels), classes)
        for row, (place, label) in enumerate(zip(places, labels, strict=True)):
            for index in label:
                if not 0 <= int(index) < classes:
                    raise DataError(f"{place}: label={index}: must be in [0, {classes})")
                found[row, int(index)] = 1.0
        return found

    def bounded(self, scores: Tensor) -> Tensor:
        """Return logits within ``MAX_LOGIT`` of 0."""
        if float(scores.detach().abs().max()) <= MAX_LOGIT:
            return scores
        return scores.clamp(-MAX_LOGIT, MAX_LOGIT)

    def losses(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Return each text's binary cross-entropy (nats), mean over classes, (N,)."""
        each: Tensor = functional.binary_cross_entropy_with_logits(
            scores.float(), targets, reduction="none"
        )
        return each.mean(dim=1)

    def right(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Return whether all of a text's classes are right, (N,)."""
        return ((scores > 0) == (targets > 0)).all(dim=1)

    def unexplained(self, rows: Tensor, scores: Tensor) -> Tensor:
        """See :meth:`Task.unexplained`: an honest row is (sigmoid - y) / C, y of zeros and ones."""
        classes = scores.shape[1]
        label = scores.sigmoid() - rows * classes  # (N, C)
        nearest = label.round().clamp(0.0, 1.0)
        away: Tensor = (label - nearest).norm(dim=1)
        return away / classes

    def families(self) -> tuple[Family, ...]:
        """Return counts per class: rightly taken for it, wrongly, and missed."""
        size = (min(self.outputs or 0, MOST_COUNTED),)
        return (Family(RIGHT, size), Family(WRONG, size), Family(MISSED, size))

    def count(
        self, scores: Tensor, targets: Tensor, parts: Sequence[int], about: object = None
    ) -> dict[str, float]:
        """Return the counts per class; none with many classes."""
        if scores.shape[1] > MOST_COUNTED:
            return {}
        told, true = scores > 0, targets > 0
        tables = {RIGHT: told & true, WRONG: told & ~true, MISSED: ~told & true}
        return {
            f"{name}-{index}": float(count)
            for name, table in tables.items()
            for index, count in enumerate(table.sum(0).tolist())
            if count
        }

    def scores(self, sums: Mapping[str, float]) -> dict[str, Any]:
        """Return micro- and macro-F1 over all classes, and recall and precision of each.

        A class that neither occurs nor is predicted has F1 0, as scikit-learn has it
        (``zero_division=0``).
        """
        table = torch.zeros(3, self.outputs or 1, dtype=torch.float64)
        for row, family in zip(table, self.families(), strict=True):
            for at, value in family.of(sums).items():
                row[at] = value
        right, wrong, missed = table
        whole = table.sum(1)
        return {
            "micro-f1": float(_f1(*whole)),
            "macro-f1": float(_f1(right, wrong, missed).mean()),
            "recalls": (right / (right + missed).clamp_min(1.0)).tolist(),
            "precisions": (right / (right + wrong).clamp_min(1.0)).tolist(),
        }

    def answers(self, scores: Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return the classes above one half, and all probabilities."""
        return [
            {
                "classes": [names[i] if names else i for i, p in enumerate(row) if p > 0.5],
                "probabilities": row,
            }
            for row in scores.double().sigmoid().tolist()
        ]


def _f1(right: Tensor, wrong: Tensor, missed: Tensor) -> Tensor:
    found: Tensor = 2 * right / (2 * right + wrong + missed).clamp_min(1.0)
    return found


def _names(cell: Cell) -> list[str]:
    """Return the names in a cell, by value."""
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        try:
            listed = json.loads(cell)
        except (ValueError, RecursionError):
            listed = None
        if isinstance(listed, list) and not any(isinstance(x, list | dict) for x in listed):
            cell = tuple(listed)
    if isinstance(cell, tuple):
        return [class_name(part) for part in cell]
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        return []
    if isinstance(cell, str):
        return [name for name in map(class_name, _SEPARATORS.split(cell)) if name]
    return [class_name(cell)]
