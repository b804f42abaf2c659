"""What an owner's data is, read as a run would read it, before any server asks for it."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from fedsplit.data import MIN_ROWS, ClassColumn, TextDataset
from fedsplit.data.choices import from_text
from fedsplit.data.table import MissingColumn
from fedsplit.deploy.node import NodeFile
from fedsplit.errors import DataError, FedsplitError
from fedsplit.owners.class_names import own_classes
from fedsplit.owners.data_source import read_own
from fedsplit.tasks.multi_label import ClassSetColumn
from fedsplit.tasks.regression import OWN as RANGE
from fedsplit.tasks.regression import TERMS, NumberColumn, parse_range
from fedsplit.tasks.token_classification import TagColumn

MOST_CLASSES = 12  # listed with their counts
Finding = tuple[str, str, str]  # (what was looked at, "ok", "warn" or "fail", what was found)


def look_at_data(node: NodeFile) -> Iterator[Finding]:
    """Yield what a run would find: texts and their lengths, labels, the split to test on.

    Raises:
        FedsplitError: the data cannot be read; names file and line.
    """
    given = str(node.node["data-path"])
    train, test = read_own(node.node, labelled=False)
    yield "data", "ok", _texts(given, train, test)
    if test is None and len(set(train.texts)) < MIN_ROWS:
        text = f"{len(set(train.texts))} different texts: must be >= {MIN_ROWS} to hold some out"
        yield "data", "fail", text
    yield _lengths(node.home, train)
    if train.choices:
        yield _choices(train)
    elif not train.chat:
        yield look_at_labels(node.node, own_classes(node.home, node.node))


def _texts(given: str, train: TextDataset, test: TextDataset | None) -> str:
    more = "a share of them is held out" if test is None else f"{len(test)} to test on"
    repeated = len(train) - len(set(train.texts))
    found = f"{given}: {len(train)} texts to train on, {more}"
    return f"{found}; {repeated} are repeated" if repeated else found


def _lengths(home: Path, train: TextDataset) -> Finding:
    """Say how long texts are: in tokens of the bottom that came last, else in characters."""
    bottom = _last_bottom(home)
    if bottom is None or train.chat:
        lengths, unit, bound = [len(text) for text in train.texts], "characters", None
    else:
        from fedsplit.models.bundle.bottom import unpack_bottom
        from fedsplit.models.positions import learned_positions
        from fedsplit.owners.own_tokens import token_counts

        model, tokenizer = unpack_bottom(bottom)
        lengths, unit = token_counts(tokenizer, train.texts), "tokens of the last model"
        bound = learned_positions(model.model)
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    text = (
        f"{statistics.median(lengths):.0f} {unit} in the middle, {lengths[longest]} at most "
        f"({train.place(longest)})"
    )
    above = 0 if bound is None else sum(length > bound for length in lengths)
    if above:
        return "lengths", "warn", f"{text}; {above} are longer than its {bound} positions: cut"
    return "lengths", "ok", text


def _last_bottom(home: Path) -> Path | None:
    found = [p for p in (home / "bottoms").glob("*") if (p / "tokenizer.json").is_file()]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _choices(train: TextDataset) -> Finding:
    counts = [len(choices) for _, choices in map(from_text, train.texts)]
    text = f"questions with {min(counts)} to {max(counts)} choices, for multiple-choice"
    return "labels", "ok", text


def look_at_labels(node: Mapping[str, object], names: tuple[str, ...] = ()) -> Finding:
    """Say what a column of labels holds: classes, tags of words, numbers, sets of classes.

    Args:
        node: an owner's node config.
        names: of the classes, in order, as far as they are known.
    """
    agreed = str(node.get(RANGE, ""))
    if agreed or names[:1] == (TERMS,):  # its own, or the first that was announced
        return _numbers(node, agreed or ",".join(names[1:]))
    column = str(node.get("label-column", "label"))
    tagged = node.get("data-kind") == "tagged"
    kind, what = (TagColumn, "tags of words") if tagged else (ClassColumn, "classes")
    try:
        train, test = read_own(node, kind(names), labelled=True)
    except MissingColumn:
        return "labels", "ok", f"no column {column!r}: texts alone, for a language model"
    except DataError as error:
        if "plain text has none" in str(error):
            return "labels", "ok", "plain text has none: for a language model"
        if "must be a name or an integer" in str(error):
            return _numbers(node)
        if "whose labels are lists" in str(error):
            return _sets(node, names)
        return "labels", "fail", str(error)
    parts = [train] if test is None else [train, test]
    if names:
        try:
            parts = [part.within(names) for part in parts]
        except FedsplitError as error:
            return "labels", "fail", str(error)
    counts: Counter[str] = Counter()
    for part in parts:
        found = part.column.counts(part.labels, part.label_names)
        counts.update({name: count for name, count in found if count})
    listed = ", ".join(f"{name} {n}" for name, n in counts.most_common(MOST_CLASSES))
    text = f"{len(counts)} {what} in {column!r}: {listed}"
    if len(counts) > MOST_CLASSES:
        text += f" and {len(counts) - MOST_CLASSES} more"
    if names or all(name.isdigit() for name in counts):
        return "labels", "ok", text
    return "labels", "warn", f"{text}; their order is not agreed: label-names, or the run's list"


def _numbers(node: Mapping[str, object], agreed: str = "") -> Finding:
    """Say what a column of numbers holds, for a regression; ``agreed``: their range, if known."""
    try:
        column = NumberColumn(*parse_range(agreed, f"node config {RANGE}")) if agreed else None
        train, test = read_own(node, column or NumberColumn(), labelled=True)
    except FedsplitError as error:
        return "labels", "fail", str(error)
    labels = [label for part in (train, test) if part is not None for label in part.labels]
    text = f"numbers from {min(labels):g} to {max(labels):g}, for a regression"
    if column is None:
        return "labels", "warn", f"{text}; their range is not agreed: {RANGE}, or the run's"
    return "labels", "ok", f"{text} within {column.low:g} to {column.high:g}"


def _sets(node: Mapping[str, object], names: tuple[str, ...]) -> Finding:
    """Say which classes a column of lists holds, for multi-label classification."""
    try:
        train, test = read_own(node, ClassSetColumn(names), labelled=True)
        parts = [part.within(names or part.label_names) for part in (train, test) if part]
    except FedsplitError as error:
        return "labels", "fail", str(error)
    counts: Counter[str] = Counter()
    for part in parts:
        counts.update(dict(part.column.counts(part.labels, part.label_names)))
    listed = ", ".join(f"{name} {n}" for name, n in counts.most_common(MOST_CLASSES))
    text = f"sets of {len(counts)} classes: {listed}"
    if names:
        return "labels", "ok", text
    return "labels", "warn", f"{text}; their order is not agreed: label-names, or the run's list"
