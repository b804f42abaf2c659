"""Pretrained models: loading, probing their anatomy, splitting, shipping and training halves.

The only part of fedsplit that imports transformers and peft.  Names are resolved on first use, so
importing this package costs nothing until a model is really handled.

| module | what it does |
| --- | --- |
| :mod:`fedsplit.models.loading` | a model and its tokenizer, safetensors only, with a digest |
| :mod:`fedsplit.models.anatomy` | where a model keeps its blocks, embeddings and head |
| :mod:`fedsplit.models.splitting.halves` | :func:`split` into bottom and top |
| :mod:`fedsplit.models.splitting.heads` | :func:`detach_head`: a head at the owner (U-shape) |
| :mod:`fedsplit.models.placing` | a top on another device, or on several |
| :mod:`fedsplit.models.bundle.bottom` | a bottom as bounded, checked files |
| :mod:`fedsplit.models.adapters.trainable` | what is trained of a top |
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedsplit.models.adapters.trainable import TRAINABLE as TRAINABLE
    from fedsplit.models.adapters.trainable import Trainable as Trainable
    from fedsplit.models.adapters.trainable import make_trainable as make_trainable
    from fedsplit.models.anatomy import Anatomy as Anatomy
    from fedsplit.models.anatomy import probe as probe
    from fedsplit.models.bundle.bottom import Bundle as Bundle
    from fedsplit.models.bundle.bottom import pack_bottom as pack_bottom
    from fedsplit.models.bundle.bottom import unpack_bottom as unpack_bottom
    from fedsplit.models.loading import TASKS as TASKS
    from fedsplit.models.loading import LoadedModel as LoadedModel
    from fedsplit.models.loading import load as load
    from fedsplit.models.loading import weights_digest as weights_digest
    from fedsplit.models.placing import place as place
    from fedsplit.models.splitting.halves import Bottom as Bottom
    from fedsplit.models.splitting.halves import Top as Top
    from fedsplit.models.splitting.halves import split as split
    from fedsplit.models.splitting.heads import Head as Head
    from fedsplit.models.splitting.heads import detach_head as detach_head

_HOME = {
    "Anatomy": "anatomy",
    "probe": "anatomy",
    "Bundle": "bundle.bottom",
    "pack_bottom": "bundle.bottom",
    "unpack_bottom": "bundle.bottom",
    "Bottom": "splitting.halves",
    "Top": "splitting.halves",
    "split": "splitting.halves",
    "Head": "splitting.heads",
    "detach_head": "splitting.heads",
    "TASKS": "loading",
    "LoadedModel": "loading",
    "load": "loading",
    "weights_digest": "loading",
    "place": "placing",
    "TRAINABLE": "adapters.trainable",
    "Trainable": "adapters.trainable",
    "make_trainable": "adapters.trainable",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> object:
    """Import the module that defines ``name`` (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
