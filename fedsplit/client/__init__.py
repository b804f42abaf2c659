"""The Flower ClientApp's work: one module per strategy, and the table that picks among them.

The app itself is :data:`fedsplit.client_app.app`, which loads this package when a message comes.
Names are resolved on first use.

Examples:
    >>> from fedsplit.client import HANDLERS
    >>> sorted(HANDLERS)
    ['offsite-tuning', 'serving', 'split-tuning']
    >>> "train" in HANDLERS["serving"]  # whatever is not in the table is refused
    False
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedsplit.registry import lazy

if TYPE_CHECKING:
    from fedsplit.client.dispatch import HANDLERS, answer
    from fedsplit.client.task import ClientTask

__all__ = [
    "HANDLERS",
    "ClientTask",
    "answer",
]

__getattr__ = lazy(
    __name__,
    {
        "dispatch": ("HANDLERS", "answer"),
        "task": ("ClientTask",),
    },
)
