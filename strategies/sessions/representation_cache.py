"""Representations the server has received: each crosses once, every later epoch reads it here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedsplit.errors import FrameError


class RepresentationCache:
    """Privatised representations by (owner, split, slot), in the precision they were sent in.

    Args:
        max_bytes: bound on what is held; an owner that would exceed it is refused.
    """

    def __init__(self, max_bytes: int = 64 << 30) -> None:
        self._rows: dict[tuple[str, str], dict[int, Tensor]] = {}
        self._unsaved: dict[tuple[str, str], list[int]] = {}
        self._max = max_bytes
        self.bytes = 0

    def put(self, owner: str, split: str, slot: int, rows: Tensor, exact: torch.dtype) -> None:
        """Keep one sample.

        Args:
            owner: the owner's public name.
            split: ``train`` or ``test``.
            slot: the owner's number of the sample.
            rows: (T, d) float32.
            exact: dtype that holds the received values without loss (bf16 rows keep 2 bytes).

        Raises:
            FrameError: if the slot is already held (a second draw must never replace the first), or
                the store is full.
        """
        held = self._rows.setdefault((owner, split), {})
        if slot in held:
            raise FrameError(f"BATCH slot {slot}: was already sent; each sample crosses once")
        kept = rows.to(exact)
        size = kept.numel() * kept.element_size()
        if self.bytes + size > self._max:
            raise FrameError(
                f"representation store of {self.bytes + size} bytes: must be <= {self._max}"
            )
        held[slot] = kept
        self._unsaved.setdefault((owner, split), []).append(slot)
        self.bytes += size

    def get(self, owner: str, split: str, slots: Sequence[int]) -> list[Tensor]:
        """Return the float32 (T, d) rows of ``slots``.

        Raises:
            FrameError: if one was never sent.
        """
        held = self._rows.get((owner, split), {})
        missing = [s for s in slots if s not in held]
        if missing:
            raise FrameError(f"BATCH slot {missing[0]}: was never sent")
        return [held[s].float() for s in slots]

    def bitmap(self, owner: str, split: str, slots: int) -> bytes:
        """Return which of the owner's ``slots`` are held, one bit each; empty if none are."""
        held = self._rows.get((owner, split))
        if not held:
            return b""
        bits = np.zeros(slots, dtype=np.uint8)
        bits[[s for s in held if s < slots]] = 1
        return np.packbits(bits).tobytes()

    def tensors(self, *, unsaved: bool = False) -> dict[str, Tensor]:
        """Return what is held: ``owner/split/{rows, slots, lengths}``, as in a transcript.

        Args:
            unsaved: only what came since :meth:`mark_saved`.
        """
        chosen = self._unsaved if unsaved else self._rows
        tensors: dict[str, Tensor] = {}
        for (owner, split), found in sorted(chosen.items()):
            held = self._rows[owner, split]
            slots = sorted(found)
            prefix = f"{owner}/{split}"
            tensors[f"{prefix}/rows"] = torch.cat([held[s] for s in slots])
            tensors[f"{prefix}/slots"] = torch.tensor(slots, dtype=torch.int64)
            lengths = [held[s].shape[0] for s in slots]
            tensors[f"{prefix}/lengths"] = torch.tensor(lengths, dtype=torch.int64)
        return tensors

    def mark_saved(self) -> None:
        """Take note that everything held is on disk."""
        self._unsaved.clear()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what :meth:`tensors` returned; it counts as saved."""
        for key in [k for k in tensors if k.endswith("/rows")]:
            prefix = key.removesuffix("/rows")
            owner, _, split = prefix.rpartition("/")
            held = self._rows.setdefault((owner, split), {})
            lengths = tensors[f"{prefix}/lengths"].tolist()
            rows = torch.split(tensors[key], lengths)
            for slot, row in zip(tensors[f"{prefix}/slots"].tolist(), rows, strict=True):
                held[slot] = row.clone()
                self.bytes += row.numel() * row.element_size()
