"""Pretrained models: loading, probing their anatomy, splitting, shipping and training halves.

The only part of fedsplit that imports transformers and peft.  Names are resolved on first use, so
importing this package costs nothing until a model is really handled.

| module | what it does |
| --- | --- |
| :mod:`fedsplit.models.loading` | a model and its tokenizer, safetensors only, with a digest |
| :mod:`fedsplit.models.anatomy` | where a model keeps its blocks, embeddings and head |
| :mod:`fedsplit.models.halves` | :func:`split` into bottom and top, and the law they obey |
| :mod:`fedsplit.models.heads` | :func:`detach_head` for a head on the owner's side (U-shape) |
| :mod:`fedsplit.models.placing` | a top on another device, or on several |
| :mod:`fedsplit.models.bundle` | a bottom as bounded, checked files |
| :mod:`fedsplit.models.trainable` | what is trained: all, head, lora, bitfit, ia3, adapter |
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedsplit.models.anatomy import Anatomy as Anatomy
    from fedsplit.models.anatomy import probe as probe
    from fedsplit.models.bundle import Bundle as Bundle
    from fedsplit.models.bundle import pack_bottom as pack_bottom
    from fedsplit.models.bundle import unpack_bottom as unpack_bottom
    from fedsplit.models.halves import Bottom as Bottom
    from fedsplit.models.halves import Top as Top
    from fedsplit.models.halves import split as split
    from fedsplit.models.heads import Head as Head
    from fedsplit.models.heads import detach_head as detach_head
    from fedsplit.models.loading import TASKS as TASKS
    from fedsplit.models.loading import LoadedModel as LoadedModel
    from fedsplit.models.loading import load as load
    from fedsplit.models.loading import weights_digest as weights_digest
    from fedsplit.models.placing import place as place
    from fedsplit.models.trainable import TRAINABLE as TRAINABLE
    from fedsplit.models.trainable import Trainable as Trainable
    from fedsplit.models.trainable import make_trainable as make_trainable

_HOME = {
    "Anatomy": "anatomy",
    "probe": "anatomy",
    "Bundle": "bundle",
    "pack_bottom": "bundle",
    "unpack_bottom": "bundle",
    "Bottom": "halves",
    "Top": "halves",
    "split": "halves",
    "Head": "heads",
    "detach_head": "heads",
    "TASKS": "loading",
    "LoadedModel": "loading",
    "load": "loading",
    "weights_digest": "loading",
    "place": "placing",
    "TRAINABLE": "trainable",
    "Trainable": "trainable",
    "make_trainable": "trainable",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> object:
    """Import the module that defines ``name`` (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
