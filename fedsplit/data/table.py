"""What a source of data is asked for, and what it hands over before labels become numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fedsplit.errors import DataError, check

Value = str | int | float | bool | None
Cell = Value | tuple[Value, ...]  # of a column of labels: one, or a list of them
EVERY = "*"  # as a text column: a row's every column is wanted
SOURCE_COLUMN = "source"  # each row's file, in a folder whose files are not splits
SEPARATOR = "\x1f"  # between the parts of a text of several columns: ASCII's unit separator


class MissingColumn(DataError):
    """A column that was asked for is not there."""


def missing_column(where: str, column: str, found: Iterable[str]) -> MissingColumn:
    """Return the error of a column that is not there, with those that are."""
    return MissingColumn(f"{where}: column={column!r}: is missing; found: {', '.join(found)}")


@dataclass(frozen=True)
class Request:
    """What is to be read.

    Attributes:
        path: a file or folder, a Hub name, or empty, as the kind of source says.
        text_column: name of the column with the texts, or several names separated by commas: a
            text then has as many parts (:func:`join_parts`).
        label_column: name of the column with the labels; empty for language modelling.
        columns: names of further columns to keep.
        passage_words: words in a passage of plain text; 0: each line is a text.
        delimiter: of delimited text, one character or ``tab``; empty: found.
        header: whether delimited text begins with its columns' names.
        quotes: whether its fields may be quoted.
    """

    path: str = ""
    text_column: str = "text"
    label_column: str = "label"
    columns: tuple[str, ...] = ()
    passage_words: int = 128
    delimiter: str = ""
    header: bool = True
    quotes: bool = True

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ConfigError: if a name is empty, given twice, or the passage length is not positive.
        """
        good = all(self.text_columns)
        check(good, "text_column", self.text_column, "a column's name, or several with commas")
        good = len(self.delimiter) <= 1 and self.delimiter not in ('"', "\n", "\r")
        good = good or self.delimiter == "tab"
        check(good, "delimiter", self.delimiter, "one character, tab, or empty")
        words = self.passage_words
        check(words >= 0, "passage_words", words, ">= 1 (words), or 0 for lines")
        names = (*self.text_columns, self.label_column, *self.columns)
        check(len(set(names)) == len(names), "columns", names, "different from each other")
        check("" not in self.columns, "columns", self.columns, "names of columns")

    @property
    def text_columns(self) -> tuple[str, ...]:
        """Names of the columns that make up a text."""
        return tuple(name.strip() for name in self.text_column.split(","))

    @property
    def wanted(self) -> tuple[str, ...]:
        """Names of all columns that are asked for."""
        texts = [column for column in self.text_columns if column != EVERY]
        return (*texts, *filter(None, [self.label_column]), *self.columns)


def join_parts(place: str, parts: Sequence[str]) -> str:
    """Return one text of the columns' parts, apart by :data:`SEPARATOR`.

    Raises:
        DataError: a part of several is blank, or holds the separator itself.
    """
    if len(parts) > 1:
        for part in parts:
            if not isinstance(part, str) or not part.strip() or SEPARATOR in part:
                raise DataError(f"{place}: text={part!r:.80}: must be a text without U+001F")
    return SEPARATOR.join(parts)


@dataclass(frozen=True, eq=False)
class Table:
    """Rows as they were found: labels still of the source's own type.

    Attributes:
        texts: one text per row.
        labels: one label per row, or empty when none were asked for.
        columns: further columns, each with one value per row.
        name: where it came from, for messages.
        label_names: the names of the classes, when the source itself fixes their order.
        chat: whether texts are conversations (:mod:`fedsplit.data.conversations`).
        choices: whether they are questions with choices (:mod:`fedsplit.data.choices`).
        places: where each row is ("file:line"), for messages; empty: the row's number says it.
    """

    texts: tuple[str, ...]
    labels: tuple[Cell, ...]
    columns: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)
    name: str = ""
    label_names: tuple[str, ...] = ()
    chat: bool = False
    choices: bool = False
    places: tuple[str, ...] = ()

    def place(self, row: int) -> str:
        """Return where a row is, in the coordinates of whoever holds the file."""
        return self.places[row] if self.places else f"{self.name}: row {row}"


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
