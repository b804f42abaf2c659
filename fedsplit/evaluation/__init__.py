"""How good a model is: perplexity of a text, and multiple choice by likelihood.

Layer 2: it takes a live model and a tokenizer, whatever they came from (a base, an emulator, a
plugged-in model), and knows nothing of any of these.  Names are resolved on first use.

| module | what it does |
| --- | --- |
| :mod:`~fedsplit.evaluation.perplexity` | nats a token of a long text, interval over blocks |
| :mod:`~fedsplit.evaluation.likelihood` | continuations scored in batches behind cached prefixes |
| :mod:`~fedsplit.evaluation.task_files` | task files that are data and nothing else |
| :mod:`~fedsplit.evaluation.harness` | lm-evaluation-harness over both (extra ``evaluate``) |

Examples:
    >>> import torch
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from fedsplit.evaluation import Likelihood, text_loss
    >>> config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=50, n_positions=32)
    >>> model = GPT2LMHeadModel(config)
    >>> loss = text_loss(model, torch.arange(40) % 50, window=16)
    >>> loss.tokens, 3 < loss.nats < 5
    (39, True)
    >>> [score] = Likelihood(model).score([([1, 2, 3], [4, 5])])
    >>> score.nats < 0
    True
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedsplit.registry import lazy

if TYPE_CHECKING:
    from fedsplit.evaluation.harness import TaskScore, run_tasks
    from fedsplit.evaluation.likelihood import Likelihood, Score
    from fedsplit.evaluation.perplexity import TextLoss, text_ids, text_loss
    from fedsplit.evaluation.task_files import LocalTask, find_tasks, read_task, write_tasks

__all__ = [
    "Likelihood",
    "LocalTask",
    "Score",
    "TaskScore",
    "TextLoss",
    "find_tasks",
    "read_task",
    "run_tasks",
    "text_ids",
    "text_loss",
    "write_tasks",
]

__getattr__ = lazy(
    __name__,
    {
        "harness": ("TaskScore", "run_tasks"),
        "likelihood": ("Likelihood", "Score"),
        "perplexity": ("TextLoss", "text_ids", "text_loss"),
        "task_files": ("LocalTask", "find_tasks", "read_task", "write_tasks"),
    },
)
