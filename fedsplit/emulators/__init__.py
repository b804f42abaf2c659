"""Emulators: what a model owner sends to be trained on instead of the model (offsite tuning).

M = [A, E]: owners train the adapter blocks A on the emulator [A, E*], and the trained A goes back
into the full model.  Layer 2; models are handled through :mod:`fedsplit.models` alone.

``COMPRESSORS`` is the family's table; a new one is a file here and one row below.

| module | what it does |
| --- | --- |
| :mod:`~fedsplit.emulators.planning.plan` | which block plays which part |
| :mod:`~fedsplit.emulators.importance.run` | scores and harmonizers by Dynamic LayerReplace |
| :mod:`~fedsplit.emulators.build` | emulator from a plan; ``plug_in``, ``adapter_state`` |
| :mod:`~fedsplit.emulators.files` | an emulator on disk, by content digest |
| :mod:`~fedsplit.emulators.planning.planner` | sizes and costs before anything is built |

Example:
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(n_layer=6, n_embd=16, n_head=2, vocab_size=50))
    >>> compressor = make_compressor("layerdrop", adapters=ends(6, 1, 1), keep=2)
    >>> emulator = compressor.build(model, Material())
    >>> emulator.plan.adapters, emulator.model.config.n_layer
    ((0, 5), 4)
    >>> before = plug_in(model, adapter_state(emulator), emulator.plan)
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from fedsplit.emulators.build import (
    Emulator,
    adapter_state,
    build_emulator,
    load_adapters,
    plug_in,
)
from fedsplit.emulators.compressors.base import Compressor, Material
from fedsplit.emulators.compressors.crash import Crash
from fedsplit.emulators.compressors.gradot import GradOT
from fedsplit.emulators.compressors.layerdrop import LayerDrop
from fedsplit.emulators.compressors.magnitude import Magnitude
from fedsplit.emulators.compressors.quantised import Quantised
from fedsplit.emulators.compressors.scaleot import ScaleOT
from fedsplit.emulators.planning.plan import EmulatorPlan, ends
from fedsplit.errors import ConfigError, check
from fedsplit.registry import pick

COMPRESSORS: dict[str, type[Any]] = {
    "crash": Crash,
    "gradot": GradOT,
    "layerdrop": LayerDrop,
    "magnitude": Magnitude,
    "quantised": Quantised,
    "scaleot": ScaleOT,
}


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


__all__ = [
    "COMPRESSORS",
    "Compressor",
    "Emulator",
    "EmulatorPlan",
    "Material",
    "adapter_state",
    "build_emulator",
    "ends",
    "load_adapters",
    "make_compressor",
    "plug_in",
]
