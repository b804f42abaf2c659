"""Names of devices in settings."""

from __future__ import annotations

import re

AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")
"""Ways to spread a model over the devices that a machine has."""

_DEVICE = re.compile(r"cpu|cuda(:[0-9]{1,3})?")


def is_device(name: str) -> bool:
    """Return whether ``name`` is that of one device: ``cpu``, ``cuda`` or ``cuda:N``."""
    return _DEVICE.fullmatch(name) is not None
