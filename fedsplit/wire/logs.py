"""Letting fedsplit's log lines appear where Flower's do."""

from __future__ import annotations

import logging

from fedsplit.observe import PrintableHandler


def join_flower_log(level: int = logging.INFO) -> None:
    """Give the loggers of the project Flower's handlers; harmless when called again.

    What their lines carry of another party's texts is escaped on the way.
    """
    for name in ("fedsplit", "strategies"):
        logger = logging.getLogger(name)
        # Other handlers (a JSON log, a test's) may have been there first.
        joined = [h.inner for h in logger.handlers if isinstance(h, PrintableHandler)]
        missing = [h for h in logging.getLogger("flwr").handlers if h not in joined]
        for handler in missing:
            logger.addHandler(PrintableHandler(handler))
        if missing:
            logger.setLevel(level)
            logger.propagate = False
