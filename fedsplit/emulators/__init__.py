"""Emulators: what a model owner sends to be trained on instead of the model (offsite tuning).

M = [A, E]: owners train the adapter blocks A on the emulator [A, E*], and the trained A goes back
into the full model.  Layer 2; models are handled through :mod:`fedsplit.models` alone.

``COMPRESSORS`` is the family's table (:mod:`~fedsplit.emulators.compressors.table`).

| module | what it does |
| --- | --- |
| :mod:`~fedsplit.emulators.planning.plan` | which block plays which part |
| :mod:`~fedsplit.emulators.importance.run` | scores and harmonizers by Dynamic LayerReplace |
| :mod:`~fedsplit.emulators.settings` | what a run's settings ask for |
| :mod:`~fedsplit.emulators.build` | emulator from a plan; ``plug_in``, ``adapter_state`` |
| :mod:`~fedsplit.emulators.files` | an emulator on disk, by content digest |
| :mod:`~fedsplit.emulators.planning.planner` | sizes and costs before anything is built |

Examples:
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(n_layer=6, n_embd=16, n_head=2, vocab_size=50))
    >>> compressor = make_compressor("layerdrop", adapters=ends(6, 1, 1), keep=2)
    >>> emulator = compressor.build(model, Material())
    >>> emulator.plan.adapters, emulator.model.config.n_layer
    ((0, 5), 4)
    >>> before = plug_in(model, adapter_state(emulator), emulator.plan)
"""

from __future__ import annotations

from fedsplit.emulators.build import (
    Emulator,
    adapter_state,
    build_emulator,
    load_adapters,
    plug_in,
)
from fedsplit.emulators.compressors.base import Compressor, Material
from fedsplit.emulators.compressors.table import COMPRESSORS, make_compressor
from fedsplit.emulators.planning.plan import EmulatorPlan, ends

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
