"""The frozen model with a switch at each block: the block itself or its harmonizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedsplit.emulators.compression.structure import Model, first
from fedsplit.emulators.importance.harmonizer import Harmonizer
from fedsplit.models.anatomy import probe


class Switch(nn.Module):
    """Runs a block or its harmonizer, as told."""

    def __init__(self, block: nn.Module, harmonizer: Harmonizer, hidden_weight: float) -> None:
        super().__init__()
        for name, value in vars(harmonizer).items():  # what families read off a block from outside
            if not name.startswith("_") and name != "training":
                setattr(self, name, value)
        self.block, self.harmonizer = block, harmonizer
        self.replaced = False
        self.hidden_weight = hidden_weight
        self.mismatch: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block, or its harmonizer, noting how far the two are apart."""
        if not self.replaced:
            return self.block(*args, **kwargs)
        output = self.harmonizer(*args, **kwargs)
        if self.hidden_weight > 0 and torch.is_grad_enabled():
            with torch.no_grad():
                target = first(self.block(*args, **kwargs))
            self.mismatch = relative_mismatch(target, first(output))
        return output


def relative_mismatch(target: Tensor, output: Tensor) -> Tensor:
    """Return mean(((T - S) / rms(T))^2), the rms over all of T (B, T, d)."""
    scale = target.detach().float().pow(2).mean().clamp_min(1e-12)
    return (target.float() - output.float()).pow(2).mean() / scale


@dataclass
class Net:
    """A model whose blocks are switches."""

    model: Model
    switches: list[Switch]

    def keep(self, kept: Sequence[int]) -> None:
        """Run the blocks at these positions, and harmonizers elsewhere."""
        for i, switch in enumerate(self.switches):
            switch.replaced = i not in kept
            switch.mismatch = None

    def mismatch(self) -> Tensor | float:
        """Return the mean mismatch of the last forward's harmonizers; 0 if none was noted."""
        found = [s.mismatch for s in self.switches if s.mismatch is not None]
        return torch.stack(found).mean() if found else 0.0


@contextmanager
def supernet(model: Model, harmonizers: list[Harmonizer], hidden_weight: float) -> Iterator[Net]:
    """Put a switch before each block of ``model`` itself; the blocks come back afterwards."""
    blocks = probe(model).blocks
    old = list(blocks)
    switches = [Switch(b, h, hidden_weight) for b, h in zip(old, harmonizers, strict=True)]
    for switch in switches:
        switch.eval()
    try:
        for i, switch in enumerate(switches):
            blocks[i] = switch
        yield Net(model, switches)
    finally:
        for i, block in enumerate(old):
            blocks[i] = block
