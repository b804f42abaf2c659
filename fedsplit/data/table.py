"""What a source of data is asked for, and what it hands over before labels become numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fedsplit.errors import check

Value = str | int | float | bool | None

EVERY = "*"  # as a text column: a row's every column is wanted


@dataclass(frozen=True)
class Request:
    """What is to be read.

    Attributes:
        path: a file or folder, a Hub name, or empty, as the kind of source says.
        text_column: name of the column with the texts.
        label_column: name of the column with the labels; empty for language modelling.
        columns: names of further columns to keep.
        passage_words: words in a passage of plain text.
    """

    path: str = ""
    text_column: str = "text"
    label_column: str = "label"
    columns: tuple[str, ...] = ()
    passage_words: int = 128

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ConfigError: if a name is empty, given twice, or the passage length is not positive.
        """
        check(bool(self.text_column), "text_column", self.text_column, "a column's name")
        check(self.passage_words >= 1, "passage_words", self.passage_words, ">= 1 (words)")
        names = (self.text_column, self.label_column, *self.columns)
        check(len(set(names)) == len(names), "columns", names, "different from each other")
        check("" not in self.columns, "columns", self.columns, "names of columns")


@dataclass(frozen=True, eq=False)
class Table:
    """Rows as they were found: labels still of the source's own type.

    Attributes:
        texts: one text per row.
        labels: one label per row, or empty when none were asked for.
        columns: further columns, each with one value per row.
        name: where it came from, for messages.
        label_names: the names, when the source itself fixes their order; labels are then indices.
        chat: whether texts are conversations (:mod:`fedsplit.data.conversations`).
    """

    texts: tuple[str, ...]
    labels: tuple[Value, ...]
    columns: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)
    name: str = ""
    label_names: tuple[str, ...] = ()
    chat: bool = False


@dataclass(frozen=True)
class Source:
    """One kind of data set: a row of :data:`fedsplit.data.DATASETS`.

    Attributes:
        splits: the names of the splits that are there.
        read: reads one of them.
        public: whether its texts are what the interpreter ships, which everyone has: owners' own
            texts of this kind are then left out of public text.
    """

    splits: Callable[[Request], tuple[str, ...]]
    read: Callable[[Request, str], Table]
    public: bool = False
