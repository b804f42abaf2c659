"""Classification of words: entities (BIO or IO tags), parts of speech."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsplit import entities
from fedsplit.data.label_column import LabelColumn, NamedColumn
from fedsplit.data.labels import agreed_first, class_indices, is_labelled
from fedsplit.data.table import Table, Value
from fedsplit.errors import DataError
from fedsplit.sums import Family
from fedsplit.tasks.base import CrossEntropy, TaggedWords
from fedsplit.tasks.classification import NamedClasses

WORDS = Family("words", (2,), bounded=False)
"""Words that were tagged rightly, and all of them, those without a token too."""


class TagColumn(NamedColumn):
    """One tag per word, by name: the tags are the classes."""

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


class TokenClassification(NamedClasses, CrossEntropy):
    """One of C tags per word, at the word's first token: cross-entropy; entity-F1 from counts.

    Which tokens have a target stays with the owner: the others' rows of the output get no gradient,
    or nothing but noise where gradients get any.

    What leaves in an evaluation, where the owner's policy lets it: entities by type
    (:mod:`fedsplit.entities`) and words, as counts.  A word that a cut took away, or that the
    tokenizer makes nothing of, counts as tagged ``O``.
    """

    name: ClassVar[str] = "token-classification"
    words: ClassVar[str] = "tags"
    head: ClassVar[str] = "token-classification"
    per_token: ClassVar[bool] = True
    form: ClassVar[str] = "words"
    metric: ClassVar[str] = "entity-f1"
    answer_columns: ClassVar[tuple[str, ...]] = ("words", "tags")

    def column(self, agreed: Sequence[str]) -> LabelColumn:
        """Return one tag per word; without names, an integer below their number is one."""
        return TagColumn(tuple(agreed), self.outputs or 0)

    def families(self) -> tuple[Family, ...]:
        """Return counts of entities (kind of count, type) and of words."""
        return (entities.FAMILY, WORDS)

    def count(
        self,
        scores: Tensor,
        targets: Tensor,
        parts: Sequence[int],
        about: object = None,
    ) -> dict[str, float]:
        """Return the counts of some texts' words, and of their entities where tags name types."""
        if not isinstance(about, TaggedWords):
            return {}
        words = about
        outside = words.names.index(entities.OUTSIDE) if entities.OUTSIDE in words.names else -1
        true, predicted = [], []
        for own, guessed in zip(
            words.texts, torch.split(scores.argmax(dim=1), list(parts)), strict=True
        ):
            tags = torch.full((len(own),), outside, dtype=torch.int64)
            tags[own[:, 0] >= 0] = guessed
            true.append(own[:, 1].tolist())
            predicted.append(tags.tolist())
        right = sum(
            a == b for text in zip(true, predicted, strict=True) for a, b in zip(*text, strict=True)
        )
        found = {"words-0": float(right), "words-1": float(sum(map(len, true)))}
        if entities.types_of(words.names):
            table = entities.count(words.names, true, predicted)
            found |= {"entities-0-0": 0.0} | entities.to_sums(table)
        return found

    def scores(self, sums: Mapping[str, float]) -> dict[str, Any]:
        """Return accuracy over all words, the entities' scores, and F1 of each type in order."""
        found: dict[str, Any] = {}
        if sums.get("words-1"):
            found["word-accuracy"] = sums.get("words-0", 0.0) / sums["words-1"]
        if entities.FAMILY.of(sums):
            counts = entities.of_sums(sums)
            found |= entities.scores(counts)
            found["entity-f1-by-type"] = entities.f1(counts[0]).tolist()
        return found

    def answer_words(
        self, words: Sequence[str], scores: Sequence[Tensor | None], names: Sequence[str]
    ) -> dict[str, Any]:
        """Return words, their most probable tags (none for a word not seen), and probabilities."""
        tags: list[Any] = []
        probabilities: list[float | None] = []
        for row in scores:
            if row is None:
                tags.append(None)
                probabilities.append(None)
                continue
            own = torch.softmax(row.double(), dim=0)
            best = int(own.argmax())
            tags.append(names[best] if names else best)
            probabilities.append(float(own[best]))
        return {"words": list(words), "tags": tags, "probabilities": probabilities}
