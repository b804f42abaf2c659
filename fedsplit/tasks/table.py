"""Table of the tasks: a new one is a file and a row here."""

from __future__ import annotations

from fedsplit.config import RunConfig
from fedsplit.data.label_column import LabelColumn
from fedsplit.errors import check
from fedsplit.registry import pick
from fedsplit.tasks.base import CrossEntropy, Task
from fedsplit.tasks.causal_lm import CausalLM
from fedsplit.tasks.classification import Classification
from fedsplit.tasks.multi_label import MultiLabel
from fedsplit.tasks.multiple_choice import MultipleChoice
from fedsplit.tasks.regression import Regression
from fedsplit.tasks.token_classification import TokenClassification

WEIGHTS = (0.01, 100.0)
"""Bounds of a class's weight."""

TASKS: dict[str, type[Task]] = {
    "sequence-classification": Classification,
    "causal-lm": CausalLM,
    "regression": Regression,
    "multi-label": MultiLabel,
    "token-classification": TokenClassification,
    "multiple-choice": MultipleChoice,
}


def task_type(name: str) -> type[Task]:
    """Return the class of a task.

    Raises:
        ConfigError: there is no such task; lists those that there are.
    """
    return pick(TASKS, name, "model.task")


def task_of(config: RunConfig) -> Task:
    """Return the task of a run.

    Raises:
        ConfigError: there is no such task.
    """
    task = task_type(config.model.task).of(config.model)
    if config.train.class_weights:
        task.weigh(class_weights(config))
    return task


def announced_column(config: RunConfig) -> LabelColumn | None:
    """Return how labels are read by a run's settings alone; None: its texts have none.

    Raises:
        ConfigError: there is no such task, or the settings do not say what its labels mean.
    """
    task = task_of(config)
    return task.column(task.announced(config.model))


def check_task(config: RunConfig) -> None:
    """Refuse a task that there is not, or settings that it does not fit.

    Raises:
        ConfigError: names the setting, its value and what it must be.
    """
    task_type(config.model.task).check_settings(config)
    class_weights(config)


def class_weights(config: RunConfig) -> tuple[float, ...]:
    """Return the weights of a run's classes, in order; empty where none are set.

    Raises:
        ConfigError: not one number for each class, one out of range, or a task without classes.
    """
    text = config.train.class_weights
    if not text:
        return ()
    kind = task_type(config.model.task)
    name = "train.class-weights"
    good = issubclass(kind, CrossEntropy) and kind.labelled
    check(good, name, text, f"empty with model.task={kind.name}, which has no classes")
    check(not config.labels.debias, name, text, "empty with labels.debias")
    least, most = WEIGHTS
    bound = f"{config.model.labels} numbers in [{least:g}, {most:g}], separated by commas"
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    good = len(found) == config.model.labels and all(least <= w <= most for w in found)
    check(good, name, text, bound)
    return found
