"""The group ``server``: with what the model owner computes."""

from __future__ import annotations

from dataclasses import dataclass

from fedsplit.config.devices import is_device
from fedsplit.errors import check


@dataclass(frozen=True)
class ServerConfig:
    """How the server's top is computed in split tuning.

    Attributes:
        workers: processes that share a cohort's owners, each with a replica of the top; 1 = the
            server's own alone.
        devices: of each worker, separated by commas (``cuda:0,cuda:1``); the first is the server's
            own.  Empty: all on ``model.device``.
        frozen_weights: what the matrices of the top's blocks are kept as where they are not
            trained: ``as-loaded``, or ``bfloat16``, ``int8`` or ``nf4``
            (:mod:`fedsplit.models.frozen_linear`), which take a half, a quarter and an eighth of
            float32's memory.
        checkpointing: while training, keep no activations inside the top's blocks and compute them
            again in the backward pass.
    """

    workers: int = 1
    devices: str = ""
    frozen_weights: str = "as-loaded"
    checkpointing: bool = False

    def __post_init__(self) -> None:
        check(1 <= self.workers <= 64, "server.workers", self.workers, "in [1, 64]")
        named = self.devices.split(",") if self.devices else []
        good = all(map(is_device, named))
        check(good, "server.devices", self.devices, "empty, or of cpu, cuda, cuda:N")
        check(bool(self.frozen_weights), "server.frozen-weights", self.frozen_weights, "a name")

    def device_of(self, worker: int) -> str:
        """Return a worker's device; empty: ``model.device``."""
        return self.devices.split(",")[worker] if self.devices else ""
