"""How a column of labels is read: what a cell may hold, and what it becomes.

A task brings the one that it needs (:meth:`fedsplit.tasks.Task.column`); :class:`ClassColumn`, one
class per text, is what a data set has where nobody says otherwise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fedsplit.data.labels import agreed_first, class_indices, is_labelled
from fedsplit.data.table import Table

Label = Any  # a class's index, a number, a tuple of indices ...: what the column's kind says


class LabelColumn(ABC):
    """Base of all kinds of label columns; an instance holds what the parties agreed on.

    Attributes:
        named: whether labels are indices into a list of names.
    """

    named: ClassVar[bool] = True

    def names(self, tables: Sequence[Table], more: Callable[[], list[Table]]) -> tuple[str, ...]:
        """Return the names that labels are indices into; empty where they are of no names.

        Args:
            tables: that are wanted.
            more: reads the data set's other splits, whose labels may have further names.
        """
        return ()

    @abstractmethod
    def read(self, table: Table, names: Sequence[str]) -> tuple[Label, ...]:
        """Return every row's label.

        Raises:
            DataError: a row has none, or none that the parties agreed on; names the row.
        """

    @abstractmethod
    def is_labelled(self, table: Table) -> bool:
        """Whether at least one row has a label that is neither missing nor kept back."""

    @abstractmethod
    def fault(self, label: object, names: Sequence[str]) -> str | None:
        """Return what a label that was read must be, if it is not that."""

    def outside(self, label: Label, names: Sequence[str], agreed: int) -> str | None:
        """Return the name of a label's class that is not among the first ``agreed``; else None."""
        return None

    def strata(self, labels: Sequence[Label]) -> tuple[int, ...]:
        """Return a number for each label, equal for labels of one kind; empty: there are no kinds.

        Rows are held out, and divided by label, in proportion to these.
        """
        return ()

    def counts(self, labels: Sequence[Label], names: Sequence[str]) -> list[tuple[str, int]]:
        """Return what occurs how often, for tables that show a data set."""
        return []


@dataclass(frozen=True)
class NamedColumn(LabelColumn):
    """Classes by name (:mod:`fedsplit.data.labels`).

    Attributes:
        agreed: the parties' names of the classes, in order; empty: none were named.
        classes: number of classes where nobody named them; 0: not known.
    """

    agreed: tuple[str, ...] = ()
    classes: int = 0


class ClassColumn(NamedColumn):
    """One class per text."""

    def names(self, tables: Sequence[Table], more: Callable[[], list[Table]]) -> tuple[str, ...]:
        """See :func:`fedsplit.data.labels.agreed_first`."""
        others = [] if self.agreed or tables[0].label_names else more()
        return agreed_first([*tables, *others], self.agreed, self.classes)

    def read(self, table: Table, names: Sequence[str]) -> tuple[int, ...]:
        """See :func:`fedsplit.data.labels.class_indices`."""
        return class_indices(table, names)

    def is_labelled(self, table: Table) -> bool:
        """See :func:`fedsplit.data.labels.is_labelled`."""
        return is_labelled(table, self.agreed)

    def fault(self, label: object, names: Sequence[str]) -> str | None:
        """See :meth:`LabelColumn.fault`."""
        if type(label) is int and 0 <= label < len(names):
            return None
        return f"an integer from 0 to {len(names) - 1}"

    def outside(self, label: int, names: Sequence[str], agreed: int) -> str | None:
        """See :meth:`LabelColumn.outside`."""
        return names[label] if label >= agreed else None

    def strata(self, labels: Sequence[int]) -> tuple[int, ...]:
        """Return the labels themselves."""
        return tuple(labels)

    def counts(self, labels: Sequence[int], names: Sequence[str]) -> list[tuple[str, int]]:
        """Return how many rows each class has."""
        found = [0] * len(names)
        for label in labels:
            found[label] += 1
        return list(zip(names, found, strict=True))
