"""Letting fedsplit's log lines appear where Flower's do."""

from __future__ import annotations

import logging


def join_flower_log(level: int = logging.INFO) -> None:
    """Give the loggers of the project Flower's handlers; harmless when called again."""
    for name in ("fedsplit", "strategies"):
        logger = logging.getLogger(name)
        if not logger.handlers:
            for handler in logging.getLogger("flwr").handlers:
                logger.addHandler(handler)
            logger.setLevel(level)
            logger.propagate = False
