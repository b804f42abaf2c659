"""The label column of texts whose every word has a tag (:mod:`fedsplit.data.tagged`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fedsplit.data.label_column import LabelColumn
from fedsplit.data.labels import agreed_first, class_indices, is_labelled
from fedsplit.data.table import Table, Value
from fedsplit.errors import DataError


@dataclass(frozen=True)
class TagColumn(LabelColumn):
    """One tag per word, by name, as :mod:`fedsplit.data.labels` has names of classes.

    Attributes:
        agreed: the parties' names of the tags, in order; empty: none were named.
        classes: number of tags where nobody named them; 0: not known.
    """

    agreed: tuple[str, ...] = ()
    classes: int = 0

    def names(self, tables: Sequence[Table], more: Callable[[], list[Table]]) -> tuple[str, ...]:
        """See :func:`fedsplit.data.labels.agreed_first`."""
        others = [] if self.agreed else more()
        flat = [_of_words(table) for table in (*tables, *others)]
        return agreed_first(flat, self.agreed, self.classes)

    def read(self, table: Table, names: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Return the indices of each text's tags.

        Raises:
            DataError: a word has no tag, or none of ``names``; names the text's place and the word.
        """
        indices = iter(class_indices(_of_words(table), names))
        return tuple(tuple(next(indices) for _ in tags) for tags in _lists(table))

    def is_labelled(self, table: Table) -> bool:
        """See :func:`fedsplit.data.labels.is_labelled`."""
        return is_labelled(_of_words(table), self.agreed)

    def fault(self, label: object, names: Sequence[str]) -> str | None:
        """See :meth:`LabelColumn.fault`."""
        if isinstance(label, tuple) and all(type(t) is int and 0 <= t < len(names) for t in label):
            return None
        return f"integers from 0 to {len(names) - 1}, one for each word"

    def outside(self, label: tuple[int, ...], names: Sequence[str], agreed: int) -> str | None:
        """See :meth:`LabelColumn.outside`."""
        return next((names[tag] for tag in label if tag >= agreed), None)

    def counts(
        self, labels: Sequence[tuple[int, ...]], names: Sequence[str]
    ) -> list[tuple[str, int]]:
        """Return how many words each tag has."""
        found = Counter(tag for label in labels for tag in label)
        return [(name, found[index]) for index, name in enumerate(names)]


def _lists(table: Table) -> list[tuple[Value, ...]]:
    """Return each text's tags.

    Raises:
        DataError: a text has one label, and no list of tags.
    """
    found = []
    for row, tags in enumerate(table.labels):
        if not isinstance(tags, tuple):
            raise DataError(
                f"{table.place(row)}: label={tags!r:.80}: must be a list of tags, one for each "
                "word; files with tags are read with data.kind=tagged (node config data-kind)"
            )
        found.append(tags)
    return found


def _of_words(table: Table) -> Table:
    """Return a table with a row for every word, as far as tags are concerned."""
    places = [
        f"{table.place(row)}: word {number}"
        for row, tags in enumerate(_lists(table))
        for number in range(1, len(tags) + 1)
    ]
    flat = tuple(tag for tags in _lists(table) for tag in tags)
    return replace(table, texts=(), labels=flat, columns={}, places=tuple(places))
