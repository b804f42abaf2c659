"""Table of the tasks: a new one is a file and a row here."""

from __future__ import annotations

from fedsplit.config import RunConfig
from fedsplit.data.label_column import LabelColumn
from fedsplit.registry import pick
from fedsplit.tasks.base import CrossEntropy, Task
from fedsplit.tasks.causal_lm import CausalLM
from fedsplit.tasks.class_weights import BALANCED, WEIGHTS, class_weights
from fedsplit.tasks.classification import Classification
from fedsplit.tasks.multi_label import MultiLabel
from fedsplit.tasks.multiple_choice import MultipleChoice
from fedsplit.tasks.regression import Regression
from fedsplit.tasks.token_classification import TokenClassification

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
    kind = task_type(config.model.task)
    task = kind.of(config.model)
    if weights := class_weights(config, kind):
        task.weigh(weights)
    elif config.train.class_weights == BALANCED:
        assert isinstance(task, CrossEntropy)
        task.let_owners_weigh(*WEIGHTS)
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
    kind = task_type(config.model.task)
    kind.check_settings(config)
    class_weights(config, kind)
