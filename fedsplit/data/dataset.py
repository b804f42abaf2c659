"""Texts with labels, checked once on entry and never changed afterwards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from fedsplit.data.label_column import ClassColumn, Label, LabelColumn
from fedsplit.data.labels import unknown_class
from fedsplit.data.table import Table, Value
from fedsplit.errors import DataError


@dataclass(frozen=True, eq=False)
class TextDataset:
    """A data set of one owner, or of all of them before it is partitioned.

    Two data sets hold the same content exactly when their :attr:`digest` is the same; objects
    compare by identity.

    Attributes:
        texts: n texts, none of them blank.
        labels: n labels as ``column`` reads them (of classes: indices into ``label_names``), or
            empty for language modelling.
        label_names: the classes' names; empty without labels, or where these are of no names.
        columns: further columns of n values each (author, age ...), which never leave the owner.
        name: where the data came from, for messages; not part of the content.
        chat: whether the texts are conversations (:mod:`fedsplit.data.conversations`).
        choices: whether they are questions with choices (:mod:`fedsplit.data.choices`).
        places: where each row is ("file:line"), for messages; not part of the content.
        column: what kind of labels these are; not part of the content.

    Raises:
        DataError: on a blank text, a text that UTF-8 cannot carry, a missing label or one out of
            range, or a column of another length; names row, value and bound.
    """

    texts: tuple[str, ...]
    labels: tuple[Label, ...] = ()
    label_names: tuple[str, ...] = ()
    columns: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)
    name: str = "dataset"
    chat: bool = False
    choices: bool = False
    places: tuple[str, ...] = ()
    column: LabelColumn = field(default_factory=ClassColumn)

    def __post_init__(self) -> None:
        """Validate every row."""
        if not self.texts:
            raise DataError(f"{self.name}: rows=0: must be >= 1")
        for row, text in enumerate(self.texts):
            check_text(self.place(row), text)
        if bool(self.labels and self.column.named) != bool(self.label_names):
            raise DataError(
                f"{self.name}: {len(self.labels)} labels and {len(self.label_names)} label names: "
                "must both be there or both be missing"
            )
        if self.labels and len(self.labels) != len(self.texts):
            raise DataError(
                f"{self.name}: labels={len(self.labels)}: must be one for each of "
                f"{len(self.texts)} rows"
            )
        if len(set(self.label_names)) != len(self.label_names):
            raise DataError(f"{self.name}: label_names={self.label_names!r}: must be distinct")
        for row, label in enumerate(self.labels):
            fault = self.column.fault(label, self.label_names)
            if fault is not None:
                raise DataError(f"{self.place(row)}: label={label!r}: must be {fault}")
        for column, values in self.columns.items():
            if len(values) != len(self.texts):
                raise DataError(
                    f"{self.name}: column {column!r}: {len(values)} values: must be one for each "
                    f"of {len(self.texts)} rows"
                )

    def place(self, row: int) -> str:
        """Return where a row is, in the coordinates of whoever holds the file."""
        return self.places[row] if self.places else f"{self.name}: row {row}"

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.texts)

    @cached_property
    def digest(self) -> str:
        """The SHA-256, in hex, of the content: texts, labels, label names and columns.

        Rows count in their order, columns by their names; ``name`` does not count.  A digest is not
        a commitment: whoever can guess the content can confirm the guess.
        """
        hasher = hashlib.sha256(b"fedsplit-dataset-v1")
        parts: list[tuple[str, Iterable[Value]]] = [
            ("texts", self.texts),
            ("labels", self.labels),
            ("label_names", self.label_names),
        ]
        if self.chat:
            parts.append(("chat", (True,)))
        if self.choices:
            parts.append(("choices", (True,)))
        parts += [(f"column:{column}", self.columns[column]) for column in sorted(self.columns)]
        for name, values in parts:
            hasher.update(json.dumps([name, list(values)]).encode())
        return hasher.hexdigest()

    def select(self, indices: Sequence[int] | npt.NDArray[Any]) -> TextDataset:
        """Return the rows at ``indices``, in that order, with the same label names.

        Args:
            indices: (m,) row numbers from 0 to n - 1.

        Raises:
            DataError: if a row number is out of range or there are none.
        """
        rows = [int(index) for index in indices]
        for row in rows:
            if not 0 <= row < len(self):
                raise DataError(f"{self.name}: row={row}: must be from 0 to {len(self) - 1}")
        return TextDataset(
            texts=tuple(self.texts[row] for row in rows),
            labels=tuple(self.labels[row] for row in rows) if self.labels else (),
            label_names=self.label_names,
            columns={c: tuple(v[row] for row in rows) for c, v in self.columns.items()},
            name=self.name,
            chat=self.chat,
            choices=self.choices,
            places=tuple(self.places[row] for row in rows) if self.places else (),
            column=self.column,
        )

    def within(self, names: Sequence[str]) -> TextDataset:
        """Return the rows with ``names``, the agreed classes, as their only label names.

        Args:
            names: the first of :attr:`label_names`, by value and in order.

        Raises:
            DataError: a row is of another class; names the row.
        """
        for row, label in enumerate(self.labels):
            outside = self.column.outside(label, self.label_names, len(names))
            if outside is not None:
                raise unknown_class(self.place(row), outside, names)
        return replace(self, label_names=tuple(names) if self.label_names else ())

    def strata(self) -> tuple[int, ...]:
        """Return a number for each row, equal for rows of one kind of label; often none."""
        return self.column.strata(self.labels) if self.labels else ()

    def label_counts(self) -> npt.NDArray[np.int64]:
        """Return how many rows each label has, shape (number of label names,)."""
        return np.bincount(
            np.asarray(self.labels, dtype=np.int64), minlength=len(self.label_names)
        ).astype(np.int64)


def build(table: Table, names: tuple[str, ...], column: LabelColumn | None = None) -> TextDataset:
    """Return the table as a data set whose labels are as ``column`` reads them.

    Without one they are classes: indices into ``names``.

    Blank texts are dropped where there are no labels (language-modelling sets use them as
    separators) and refused where there are.

    Raises:
        DataError: if a label is not in ``names``, or a row is malformed.
    """
    if not table.labels:
        keep = [row for row, text in enumerate(table.texts) if text.strip()]
        columns = {c: tuple(v[row] for row in keep) for c, v in table.columns.items()}
        return TextDataset(
            tuple(table.texts[row] for row in keep),
            columns=columns,
            name=table.name,
            chat=table.chat,
            choices=table.choices,
            places=tuple(table.place(row) for row in keep),
        )
    column = column or ClassColumn(names)
    labels = column.read(table, names)
    return TextDataset(
        table.texts,
        labels,
        names,
        dict(table.columns),
        table.name,
        places=table.places,
        column=column,
    )


def check_text(place: str, text: object) -> None:
    """Refuse what is no text that has something in it.

    Raises:
        DataError: names the place and what is wrong.
    """
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{place}: text={text!r}: must be a text that is not blank")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: text has the lone surrogate {text[error.start]!a} at character "
            f"{error.start}: must be valid Unicode"
        ) from None
