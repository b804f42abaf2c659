"""Texts with labels, checked once on entry and never changed afterwards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from fedsplit.data.table import Table, Value
from fedsplit.errors import DataError


@dataclass(frozen=True, eq=False)
class TextDataset:
    """A data set of one owner, or of all of them before it is partitioned.

    Two data sets hold the same content exactly when their :attr:`digest` is the same; objects
    compare by identity.

    Attributes:
        texts: n texts, none of them blank.
        labels: n indices into ``label_names``, or empty for language modelling.
        label_names: the classes' names; empty exactly when ``labels`` is.
        columns: further columns of n values each (author, age ...), which never leave the owner.
        name: where the data came from, for messages; not part of the content.
        chat: whether the texts are conversations (:mod:`fedsplit.data.conversations`).

    Raises:
        DataError: on a blank text, a text that UTF-8 cannot carry, a missing label or one out of
            range, or a column of another length; names row, value and bound.
    """

    texts: tuple[str, ...]
    labels: tuple[int, ...] = ()
    label_names: tuple[str, ...] = ()
    columns: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)
    name: str = "dataset"
    chat: bool = False

    def __post_init__(self) -> None:
        """Validate every row."""
        if not self.texts:
            raise DataError(f"{self.name}: rows=0: must be >= 1")
        for row, text in enumerate(self.texts):
            _check_text(self.name, row, text)
        if bool(self.labels) != bool(self.label_names):
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
            if type(label) is not int or not 0 <= label < len(self.label_names):
                raise DataError(
                    f"{self.name}: row {row}: label={label!r}: must be an integer from 0 to "
                    f"{len(self.label_names) - 1}"
                )
        for column, values in self.columns.items():
            if len(values) != len(self.texts):
                raise DataError(
                    f"{self.name}: column {column!r}: {len(values)} values: must be one for each "
                    f"of {len(self.texts)} rows"
                )

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
        )

    def label_counts(self) -> npt.NDArray[np.int64]:
        """Return how many rows each label has, shape (number of label names,)."""
        return np.bincount(
            np.asarray(self.labels, dtype=np.int64), minlength=len(self.label_names)
        ).astype(np.int64)


def label_names(tables: Sequence[Table]) -> tuple[str, ...]:
    """Return the names of all labels in the tables, sorted; as numbers when all are integers.

    Raises:
        DataError: if a label is not a string, an integer or a boolean.
    """
    for table in tables:
        if table.label_names:
            return table.label_names
    names = {
        _label_text(table.name, row, label)
        for table in tables
        for row, label in enumerate(table.labels)
    }
    try:
        return tuple(sorted(names, key=int))
    except ValueError:
        return tuple(sorted(names))


def build(table: Table, names: tuple[str, ...]) -> TextDataset:
    """Return the table as a data set whose labels are indices into ``names``.

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
        )
    labels: list[int] = []
    index = {name: position for position, name in enumerate(names)}
    for row, label in enumerate(table.labels):
        if table.label_names:  # the source's own indices, checked by TextDataset
            labels.append(label)  # type: ignore[arg-type]
            continue
        text = _label_text(table.name, row, label)
        if text not in index:
            raise DataError(
                f"{table.name}: row {row}: label={text!r}: must be one of {', '.join(names)}"
            )
        labels.append(index[text])
    return TextDataset(table.texts, tuple(labels), names, dict(table.columns), table.name)


def _label_text(name: str, row: int, label: Value) -> str:
    """Return the label as its name: ``1``, ``1.0`` and ``"1"`` are the same label."""
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    if isinstance(label, (str, int)) and str(label).strip():
        return str(label)
    raise DataError(f"{name}: row {row}: label={label!r}: must be a name or an integer")


def _check_text(name: str, row: int, text: object) -> None:
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{name}: row {row}: text={text!r}: must be a text that is not blank")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{name}: row {row}: text has the lone surrogate {text[error.start]!a} at character "
            f"{error.start}: must be valid Unicode"
        ) from None
