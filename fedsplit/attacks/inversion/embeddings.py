"""Token embeddings as an attacker handles them: all at once, and soft ones in their place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def soft_embeddings(embedding: nn.Module) -> Iterator[list[Tensor]]:
    """Replace what ``embedding`` returns by the one tensor in the yielded list, if there is one.

    The replacement gets the scaling that the module itself applies (Gemma's is a subclass).
    """
    slot: list[Tensor] = []

    def replace(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return slot[0] if slot else None

    with embedding.register_forward_hook(replace):
        yield slot


def embedding_table(embedding: nn.Module, vocab_size: int, device: torch.device) -> Tensor:
    """Return what the module returns for every id, ``(V, d_e)``: scaling included."""
    with torch.no_grad():
        out: Tensor = embedding(torch.arange(vocab_size, device=device))
    return out.float()
