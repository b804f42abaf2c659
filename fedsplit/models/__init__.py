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

Examples:
    >>> import torch
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from fedsplit.models import split
    >>> config = GPT2Config(n_layer=4, n_embd=16, n_head=2, vocab_size=50, use_cache=False)
    >>> model = GPT2LMHeadModel(config).eval()
    >>> bottom, top = split(model, k=1)
    >>> ids = torch.tensor([[3, 1, 4, 1, 5]])
    >>> torch.allclose(top(bottom(ids)), model(ids).logits, atol=1e-5)
    True
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedsplit.registry import lazy

if TYPE_CHECKING:
    from fedsplit.models.adapters.trainable import TRAINABLE, Trainable, make_trainable
    from fedsplit.models.anatomy import Anatomy, probe
    from fedsplit.models.bundle.bottom import Bundle, pack_bottom, unpack_bottom
    from fedsplit.models.loading import HEADS, LoadedModel, load, weights_digest
    from fedsplit.models.placing import place
    from fedsplit.models.splitting.halves import Bottom, Top, split
    from fedsplit.models.splitting.heads import Head, detach_head

__all__ = [
    "HEADS",
    "TRAINABLE",
    "Anatomy",
    "Bottom",
    "Bundle",
    "Head",
    "LoadedModel",
    "Top",
    "Trainable",
    "detach_head",
    "load",
    "make_trainable",
    "pack_bottom",
    "place",
    "probe",
    "split",
    "unpack_bottom",
    "weights_digest",
]

__getattr__ = lazy(
    __name__,
    {
        "anatomy": ("Anatomy", "probe"),
        "bundle.bottom": ("Bundle", "pack_bottom", "unpack_bottom"),
        "splitting.halves": ("Bottom", "Top", "split"),
        "splitting.heads": ("Head", "detach_head"),
        "loading": ("HEADS", "LoadedModel", "load", "weights_digest"),
        "placing": ("place",),
        "adapters.trainable": ("TRAINABLE", "Trainable", "make_trainable"),
    },
)
