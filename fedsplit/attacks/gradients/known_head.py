"""A vocabulary projection as an attacker knows it: logits = W h + b, whatever scales W."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from fedsplit.errors import AttackError
from fedsplit.models.anatomy import probe

TOLERANCE = 1e-3  # of the logits that W h + b does not explain


@dataclass(frozen=True)
class LinearHead:
    """The linear map from final hidden states to logits.

    Attributes:
        weight: ``(V, d)`` float32, a factor that the model puts on logits included.
        bias: ``(V,)``.
    """

    weight: Tensor
    bias: Tensor

    @property
    def vocab(self) -> int:
        """Number of token ids."""
        return int(self.weight.shape[0])

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of final hidden states, ``(N, d) -> (N, V)``."""
        return hidden.float() @ self.weight.T + self.bias

    @classmethod
    @torch.no_grad()
    def of(cls, head: Any) -> Self:
        """Return the map that a language model's head computes.

        Args:
            head: a :class:`fedsplit.models.splitting.heads.Head`.

        Raises:
            AttackError: it is not linear (capped logits, for one).
        """
        projection = cast(nn.Linear, probe(head.model).output_embeddings)
        weight = projection.weight.detach().float()  # (V, d)
        draw = torch.Generator().manual_seed(0)
        rows = torch.randn(8, weight.shape[1], generator=draw)
        mask = torch.ones(1, len(rows), dtype=torch.long)
        bias = head(torch.zeros_like(rows)[None], mask)[0, 0].float()  # (V,)
        found = head(rows[None], mask)[0].float() - bias  # (8, V)
        plain = rows @ weight.T
        scale = float((found * plain).sum() / plain.square().sum())
        if float((found - scale * plain).norm()) > TOLERANCE * float(found.norm()):
            raise AttackError(f"{type(head.model).__name__}: its head must be linear: W h + b")
        return cls(scale * weight, bias)
