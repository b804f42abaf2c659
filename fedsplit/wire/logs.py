"""Letting fedsplit's log lines appear where Flower's do."""

from __future__ import annotations

import logging


def join_flower_log(level: int = logging.INFO) -> None:
    """Give the loggers of the project Flower's handlers; harmless when called again."""
    for name in ("fedsplit", "strategies"):
        logger = logging.getLogger(name)
        # Other handlers (a JSON log, a test's) may have been there first.
        missing = [h for h in logging.getLogger("flwr").handlers if h not in logger.handlers]
        for handler in missing:
            logger.addHandler(handler)
        if missing:
            logger.setLevel(level)
            logger.propagate = False
