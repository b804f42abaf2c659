"""Entities in sequences of tags, and their scores from counts alone.

Tags are ``O``, ``B-TYPE`` (first word of an entity) and ``I-TYPE`` (a later one); names without any
``B-`` are IO tags, where words of one type that follow each other are one entity.  Two readings,
both equal to seqeval's (and so to conlleval's, the first):

- ``default``: every tag counts.  ``I-`` after ``O``, or after another type, begins an entity.
- ``strict``: an entity begins with ``B-`` and goes on with ``I-`` of its type; any other ``I-`` is
  no part of one (seqeval's ``mode="strict", scheme=IOB2``).  For IO tags the two are the same.

An entity is right when type, first and last word are.  Right, predicted and true entities are
counted by type; counts add up over owners, so these scores are those of all predictions together,
and nobody needs anybody's texts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from fedsplit.sums import Family

Counts = npt.NDArray[np.int64]
Entity = tuple[str, int, int]  # (type, first word, last word)

OUTSIDE = "O"
MODES = ("default", "strict")
COUNTED = ("right", "predicted", "true")
KINDS = tuple((mode, counted) for mode in MODES for counted in COUNTED)
MOST_TYPES = 64  # whose counts are reported
_TAG = re.compile(r"([BI])-(.+)", re.DOTALL)
FAMILY = Family("entities", (len(KINDS), MOST_TYPES), bounded=False)


def types_of(names: Sequence[str]) -> tuple[str, ...]:
    """Return the types that tags name, in order of first mention; empty: these are no entity tags.

    Args:
        names: of all tags; entity tags are ``O`` and those with ``B-`` or ``I-`` before the type.
    """
    matches = [_TAG.fullmatch(name) for name in names if name != OUTSIDE]
    if not matches or OUTSIDE not in names:
        return ()
    types = [match[2] for match in matches if match is not None]
    return tuple(dict.fromkeys(types)) if len(types) == len(matches) else ()


def entities(tags: Sequence[str], mode: str = "default") -> set[Entity]:
    """Return the entities of one text.

    Args:
        tags: of its words.
        mode: a reading of :data:`MODES`; ``strict`` is for tags with ``B-``.
    """
    found: set[Entity] = set()
    kind, first = "", 0  # of the entity that is open; empty: none is
    for at, tag in enumerate([*tags, OUTSIDE]):
        match = _TAG.fullmatch(tag)
        goes_on = bool(kind) and match is not None and match[1] == "I" and match[2] == kind
        if goes_on:
            continue
        if kind:
            found.add((kind, first, at - 1))
        begins = match is not None and (match[1] == "B" or mode == "default")
        kind, first = (match[2] if match is not None and begins else ""), at
    return found


def count(
    names: Sequence[str],
    true: Iterable[Sequence[int]],
    predicted: Iterable[Sequence[int]],
) -> Counts:
    """Return the counts of some texts, (modes, types, 3) as :data:`COUNTED` names the last axis.

    Args:
        names: of the tags, by index; entity tags (see :func:`types_of`).
        true: one sequence of tags' indices for each text, one index for each word.
        predicted: the same, as predicted.
    """
    types = {name: index for index, name in enumerate(types_of(names))}
    modes = MODES if any(name.startswith("B-") for name in names) else ("default", "default")
    found = np.zeros((len(MODES), len(types), len(COUNTED)), dtype=np.int64)
    for own, guessed in zip(true, predicted, strict=True):
        sides = [[names[index] for index in side] for side in (own, guessed)]
        for table, mode in zip(found, modes, strict=True):
            right, wrong = (entities(side, mode) for side in sides)
            for column, counted in enumerate((right & wrong, wrong, right)):
                for kind, _, _ in counted:
                    table[types[kind], column] += 1
    return found


def to_sums(counts: Counts) -> dict[str, float]:
    """Return counts (modes, types, 3) as additive numbers of a report; zeros are left out.

    The key of a number is ``entities-K-T``: K its place in :data:`KINDS`, T the type's, as owners
    may keep the names of tags to themselves.
    """
    return {
        f"entities-{len(COUNTED) * m + c}-{t}": float(counts[m, t, c])
        for m, t, c in np.argwhere(counts[:, :MOST_TYPES]).tolist()
    }


def of_sums(sums: Mapping[str, float], types: int = 0) -> Counts:
    """Return the counts that :func:`to_sums` wrote, (modes, types, 3) with ``types`` at least."""
    found = FAMILY.of(sums)
    types = max([types, *(1 + kind for _, kind in found)])
    counts = np.zeros((len(MODES), types, len(COUNTED)), dtype=np.int64)
    for (row, kind), value in found.items():
        mode, counted = divmod(row, len(COUNTED))
        counts[mode, kind, counted] = int(value)
    return counts


def f1(counts: Counts) -> npt.NDArray[np.float64]:
    """Return F1 = 2 right / (predicted + true) along the last axis; 0 where there is nothing."""
    right, predicted, true = (counts[..., c].astype(np.float64) for c in range(len(COUNTED)))
    return np.asarray(2 * right / np.maximum(predicted + true, 1), dtype=np.float64)


def scores(counts: Counts) -> dict[str, float]:
    """Return entity-F1 with precision and recall over all types, and its mean over types.

    Equal to seqeval's ``f1_score``, ``precision_score`` and ``recall_score`` with
    ``average="micro"``, and to ``average="macro"`` over the types that occur (as a true or a
    predicted entity); ``strict-`` before those of the strict reading.

    Args:
        counts: (modes, types, 3).
    """
    found: dict[str, float] = {}
    for mode, table in zip(MODES, counts, strict=True):
        total = table.sum(0)  # (3,)
        there = table.sum(1) > 0
        before = "" if mode == "default" else f"{mode}-"
        found[f"{before}entity-f1"] = float(f1(total))
        found[f"{before}entity-precision"] = float(total[0] / max(total[1], 1))
        found[f"{before}entity-recall"] = float(total[0] / max(total[2], 1))
        found[f"{before}entity-macro-f1"] = float(f1(table)[there].mean()) if there.any() else 0.0
    return found
