"""Settings of a run given as keyword arguments, as a Flower user's own ServerApp gives them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any, TypeAlias

from flwr.app import Context
from flwr.supercore.task_identity import TaskIdentity

from fedsplit.config import RunConfig, Scalar
from fedsplit.errors import ConfigError
from fedsplit.settings import read_settings

Settings: TypeAlias = RunConfig | Mapping[str, Any] | Context | None


def run_config(base: Settings = None, strategy: str = "", **settings: Any) -> RunConfig:
    """Return the settings of a run.

    Args:
        base: what to begin with: a RunConfig, flat settings (``{"train.lr": 0.01}``), a Flower
            context (its run config); None: the defaults.
        strategy: row of :data:`strategies.STRATEGIES`; empty: as ``base`` has it.
        settings: single settings that replace those of ``base``.  ``model="gpt2"`` is
            ``model.name``.  A name that one section alone has stands by itself (``k=2``,
            ``rounds=3``, ``mechanism="dchi"``); any setting may be written ``SECTION_NAME``
            (``privacy_clip=1.0``); a whole section is a mapping or its dataclass
            (``privacy={"mechanism": "dchi", "eta": 40.0}``).

    Raises:
        ConfigError: an unknown or ambiguous name, a wrong type, or a value out of range.
    """
    if isinstance(base, Context):
        base = dict(base.run_config)
    flat: dict[str, Scalar] = dict(base.to_flat() if isinstance(base, RunConfig) else base or {})
    for name, value in settings.items():
        flat |= _flat(name, value)
    if strategy:
        flat["strategy"] = strategy
    return read_settings(flat)


def current_run(base: Settings, run_id: int | None) -> int:
    """Return Flower's id of the run: the one given, the context's, or this process's.

    Raises:
        ConfigError: there is none, because no Flower app runs in this process.
    """
    if run_id is not None:
        return run_id
    if isinstance(base, Context):
        return base.run_id
    try:
        return int(TaskIdentity.run_id)
    except RuntimeError:
        raise ConfigError(
            "run_id=None: must be given, or a Context, where no Flower app runs (make the grid "
            "first)"
        ) from None


def _flat(name: str, value: Any) -> dict[str, Scalar]:
    """Return one keyword argument as flat settings."""
    known = RunConfig().to_flat()
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {f"{name}.{key.replace('_', '-')}": item for key, item in value.items()}
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if name == "model":
        return {"model.name": value}
    if name in known:
        return {name: value}
    dashed = name.replace("_", "-")
    found = [k for k in known if k.partition(".")[2] == dashed or k.replace(".", "-") == dashed]
    if len(found) == 1:
        return {found[0]: value}
    if found:
        names = " or ".join(k.replace(".", "_").replace("-", "_") for k in found)
        raise ConfigError(f"{name}={value!r}: in several sections: must be {names}")
    raise ConfigError(f"{name}={value!r}: unknown setting; known: {', '.join(known)}")
