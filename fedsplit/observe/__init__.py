"""Logging: the context of a log line, and log lines as JSON.

Nothing in here opens a connection; what a party writes stays in its own folder.
"""

from fedsplit.observe.context import bound, carried, context
from fedsplit.observe.json_lines import JsonLines, writing

__all__ = ["JsonLines", "bound", "carried", "context", "writing"]
