"""Modules that are imported inside Flower's processes, from this folder alone."""

from __future__ import annotations

from pathlib import Path

from simulations.runtime.hooks.fedsplit_ray_hook import (
    CLIENT_ENVIRONMENT_VARIABLE as CLIENT_ENVIRONMENT_VARIABLE,
)

FOLDER = str(Path(__file__).resolve().parent)
RAY_HOOK = "fedsplit_ray_hook.add_client_environment"
