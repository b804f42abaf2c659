"""Gives Ray's workers an environment of their own; named by ``RAY_RUNTIME_ENV_HOOK``.

In a Flower simulation the ServerApp is a thread of the process that starts Ray, and Ray's workers
inherit that process's environment: ``OMP_NUM_THREADS`` would be the same for the server and for
every client.  Ray calls this function with the ``runtime_env`` that Flower passed to ``ray.init``,
and what it adds reaches the workers only, before their first import.

This folder is put on the simulation's PYTHONPATH by itself, so that nothing else of the checkout
becomes importable there.
"""

from __future__ import annotations

import json
import os
from typing import Any

CLIENT_ENVIRONMENT_VARIABLE = "FEDSPLIT_CLIENT_ENVIRONMENT"


def add_client_environment(runtime_env: dict[str, Any] | None) -> dict[str, Any]:
    """Return ``runtime_env`` with the client environment added to its ``env_vars``."""
    changed = dict(runtime_env or {})
    extra = json.loads(os.environ.get(CLIENT_ENVIRONMENT_VARIABLE, "{}"))
    changed["env_vars"] = {**(changed.get("env_vars") or {}), **extra}
    return changed
