"""The group ``server``: with what the model owner computes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fedsplit.errors import check

_DEVICE = re.compile(r"cpu|cuda(:\d+)?")


@dataclass(frozen=True)
class ServerConfig:
    """How the server's top is computed in split tuning.

    Attributes:
        workers: processes that share a cohort's owners, each with a replica of the top; 1 = the
            server's own alone.
        devices: of each worker, separated by commas (``cuda:0,cuda:1``); the first is the server's
            own.  Empty: all on ``model.device``.
    """

    workers: int = 1
    devices: str = ""

    def __post_init__(self) -> None:
        check(1 <= self.workers <= 64, "server.workers", self.workers, "in [1, 64]")
        named = self.devices.split(",") if self.devices else []
        good = all(_DEVICE.fullmatch(name) for name in named)
        check(good, "server.devices", self.devices, "empty, or of cpu, cuda, cuda:N")

    def device_of(self, worker: int) -> str:
        """Return a worker's device; empty: ``model.device``."""
        return self.devices.split(",")[worker] if self.devices else ""
