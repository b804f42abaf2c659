"""What a model is tuned for: labels, loss, reports, scores and answers of each task.

Layer 1.  A task is one file with everything about it and one row of :data:`TASKS`; nothing else in
the project names it.

Examples:
    >>> from fedsplit.tasks import task_type
    >>> task_type("sequence-classification").head
    'sequence-classification'
"""

from __future__ import annotations

from fedsplit.tasks.base import ChoiceGroups, CrossEntropy, TaggedWords, Task
from fedsplit.tasks.class_weights import BALANCED, balanced_weights
from fedsplit.tasks.table import TASKS, announced_column, check_task, task_of, task_type

__all__ = [
    "BALANCED",
    "TASKS",
    "ChoiceGroups",
    "CrossEntropy",
    "TaggedWords",
    "Task",
    "announced_column",
    "balanced_weights",
    "check_task",
    "task_of",
    "task_type",
]
