"""The ways to make an emulator, by name."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from fedsplit.emulators.compressors.base import Compressor
from fedsplit.emulators.compressors.crash import Crash
from fedsplit.emulators.compressors.gradot import GradOT
from fedsplit.emulators.compressors.layerdrop import LayerDrop
from fedsplit.emulators.compressors.magnitude import Magnitude
from fedsplit.emulators.compressors.quantised import Quantised
from fedsplit.emulators.compressors.scaleot import ScaleOT
from fedsplit.emulators.compressors.withholding import Withholding
from fedsplit.errors import ConfigError, check
from fedsplit.registry import pick

COMPRESSORS: dict[str, type[Any]] = {
    row.name: row for row in (ScaleOT, LayerDrop, Crash, GradOT, Magnitude, Quantised, Withholding)
}
"""The family's table; a new compressor is a file here and one row, and nothing else names it."""


def make_compressor(name: str, **params: Any) -> Compressor:
    """Return the compressor ``name`` with its settings.

    Raises:
        ConfigError: for an unknown name, an unknown, missing or out-of-range setting.
    """
    row = pick(COMPRESSORS, name, "compressor")
    known = [f.name for f in fields(row)]
    for key in params:
        check(key in known, f"{name} setting", key, f"one of {', '.join(known)}")
    try:
        made: Compressor = row(**params)
    except TypeError as error:
        raise ConfigError(f"compressor={name!r}: {error}") from error
    return made
