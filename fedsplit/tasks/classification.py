"""Classification of texts, or of pairs of texts: each is of exactly one class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsplit import confusion, score_levels
from fedsplit.config import ModelConfig, RunConfig
from fedsplit.data.label_column import ClassColumn, LabelColumn
from fedsplit.data.labels import names_digest, numerals, parse_class_names
from fedsplit.errors import ConfigError, DataError, check
from fedsplit.statistics import auc
from fedsplit.sums import Family
from fedsplit.tasks.base import CrossEntropy, Task

OWN = "label-names"
MOST_CLASSES = 100_000
MOST_SCORED = 1024
"""Classes whose table of true and predicted ones is made where all predictions are at hand."""
MOST_READ = 256
"""Classes that readers of gradients try one by one."""


def check_names(config: RunConfig) -> None:
    """Refuse a number of classes out of range, or names of another number of classes.

    Raises:
        ConfigError: names the setting and what it must be.
    """
    labels = config.model.labels
    check(2 <= labels <= MOST_CLASSES, "model.labels", labels, f"in [2, {MOST_CLASSES}]")
    names = parse_class_names(config.model.label_names, "model.label-names")
    good = not names or len(names) == labels
    check(good, "model.label-names", config.model.label_names, f"{labels} names")


def announced_names(model: ModelConfig) -> tuple[str, ...]:
    """Return the classes' names that a server announces, in order; empty: none."""
    return parse_class_names(model.label_names, "model.label-names")


def agreed_names(model: ModelConfig, own_text: str) -> tuple[str, ...]:
    """Return the classes' names, in order: announced, or the owner's own, or the numerals.

    Raises:
        ConfigError: the server announces another list than the owner's own, or another number of
            classes.
    """
    announced = announced_names(model)
    own = parse_class_names(own_text, f"node config {OWN}")
    if own and announced and names_digest(own) != names_digest(announced):
        raise ConfigError(
            f"model.label-names={model.label_names!r:.200}: must be this owner's own "
            f"{OWN}: {', '.join(own)}"
        )
    if own and len(own) != model.labels:
        raise ConfigError(
            f"model.labels={model.labels}: must be {len(own)}, the number of this owner's own {OWN}"
        )
    return announced or own or numerals(model.labels)


class NamedClasses(Task):
    """Base of the tasks with one output for each of C classes, whose names the parties agree on."""

    named: ClassVar[bool] = True
    terms_setting: ClassVar[str] = OWN

    @classmethod
    def check_settings(cls, config: RunConfig) -> None:
        """See :func:`check_names`."""
        check_names(config)

    @classmethod
    def outputs_of(cls, labels: int) -> int:
        """Return one logit per class."""
        return labels

    def announced(self, model: ModelConfig) -> tuple[str, ...]:
        """Return the announced names."""
        return announced_names(model)

    def agreed(self, model: ModelConfig, own: str) -> tuple[str, ...]:
        """See :func:`agreed_names`."""
        return agreed_names(model, own)


class Classification(NamedClasses, CrossEntropy):
    """One of C classes per text: cross-entropy; accuracy, F1 and the rest from counts.

    What leaves in an evaluation, where the owner's policy lets it: counts of true and predicted
    classes (:mod:`fedsplit.confusion`).
    """

    name: ClassVar[str] = "sequence-classification"
    words: ClassVar[str] = "classes"
    head: ClassVar[str] = "sequence-classification"
    exclusive: ClassVar[bool] = True
    metric: ClassVar[str] = "accuracy"

    def column(self, agreed: Sequence[str]) -> LabelColumn:
        """Return one class per cell; without names, an integer below their number is one."""
        return ClassColumn(tuple(agreed), self.outputs or 0)

    def tensor(self, labels: Sequence[Any], places: Sequence[str]) -> Tensor:
        """Return the classes' indices, (N,) int64."""
        for place, label in zip(places, labels, strict=True):
            if not 0 <= int(label) < (self.outputs or 0):
                raise DataError(f"{place}: label={label}: must be in [0, {self.outputs})")
        return torch.tensor([int(label) for label in labels], dtype=torch.int64)

    def families(self) -> tuple[Family, ...]:
        """Return counts (true class, predicted class); of two classes, (true class, score)."""
        if self.outputs == 2:
            return (confusion.FAMILY, score_levels.FAMILY)
        return (confusion.FAMILY,)

    def count(
        self, scores: Tensor, targets: Tensor, parts: Sequence[int], about: object = None
    ) -> dict[str, float]:
        """Return the counts of true and predicted classes; none with many classes."""
        classes = scores.shape[1]
        if classes > confusion.MOST_CLASSES:
            return {}
        pairs = targets * classes + scores.argmax(dim=1)
        table = torch.bincount(pairs, minlength=classes**2).reshape(classes, classes)
        found = confusion.to_report(table.numpy())
        if classes == 2:
            margins = (scores[:, 1] - scores[:, 0]).double()
            found |= score_levels.to_report(targets.numpy(), margins.numpy())
        return found

    def scores(self, sums: Mapping[str, float]) -> dict[str, Any]:
        """Return the scores of the added counts, recalls by class, and the counts themselves."""
        table = confusion.of_reports([sums])
        found: dict[str, Any] = dict(confusion.scores(table))
        found.pop("accuracy", None)  # the average that every owner reports
        curve = score_levels.area(sums)
        if curve is not None:
            found["auc"], found["auc-error"] = curve
        found["recalls"] = confusion.recalls(table).tolist()
        found["confusion"] = table.tolist()
        return found

    def exact(self, scores: Tensor, targets: Tensor) -> dict[str, Any]:
        """Return the scores of up to 1,024 classes, and the area under the ROC curve of two."""
        classes = scores.shape[1]
        if classes > MOST_SCORED:
            return {}
        pairs = targets * classes + scores.argmax(dim=1)
        table = torch.bincount(pairs, minlength=classes**2).reshape(classes, classes).numpy()
        found: dict[str, Any] = dict(confusion.scores(table))
        found["recalls"] = confusion.recalls(table).tolist()
        margins, positive = (scores[:, -1] - scores[:, 0]).double(), targets == 1
        if classes == 2 and 0 < int(positive.sum()) < len(targets):
            found["auc"] = auc(margins[positive].numpy(), margins[~positive].numpy())
        return found

    def hypotheses(self, targets: Tensor) -> list[Tensor] | None:
        """Return every class."""
        classes = self.outputs or 0
        if not 2 <= classes <= MOST_READ:
            return None
        return [torch.full_like(targets, c) for c in range(classes)]

    def truth(self, targets: Tensor) -> Tensor:
        """Return the classes themselves."""
        return targets

    answer_columns: ClassVar[tuple[str, ...]] = ("class", "probability")

    def answers(self, scores: Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return the most probable class, its probability, and all probabilities."""
        found = []
        for row in torch.softmax(scores.double(), dim=1).tolist():
            best = max(range(len(row)), key=row.__getitem__)
            found.append(
                {
                    "class": names[best] if names else best,
                    "probability": row[best],
                    "probabilities": row,
                }
            )
        return found
