"""Logging: the context of a log line, and log lines as JSON.

Nothing in here opens a connection; what a party writes stays in its own folder.
"""

from fedsplit.observe.context import bound, carried, context
from fedsplit.observe.json_lines import JsonLines, writing
from fedsplit.observe.printable import PrintableHandler, printable

__all__ = [
    "JsonLines",
    "PrintableHandler",
    "bound",
    "carried",
    "context",
    "printable",
    "writing",
]
