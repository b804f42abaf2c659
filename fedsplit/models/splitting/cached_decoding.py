"""Cached decoding through a split model: token by token, with a key/value cache on each side.

Guarantee: fed with a text in pieces, bottom and top together give the logits of the whole model at
the end of every piece.  It is checked for the very model before anything is generated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from fedsplit.errors import ConfigError, UnsupportedModelError
from fedsplit.models.modes import probing
from fedsplit.models.splitting.equivalence import TOLERANCE, relative_difference
from fedsplit.models.splitting.halves import Bottom, Top
from fedsplit.models.splitting.structure import Reached


class HalfCache(Cache):
    """Keys and values of the blocks that one half has, under the numbers they have in the whole.

    A half counts its tokens itself: transformers asks the first block's entry, which a top does not
    have and a bottom of embeddings never fills.  Every block keeps all tokens; windows are applied
    by the family's masks.

    Attributes:
        seen: tokens that earlier steps brought.
    """

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self.seen = 0
        self._blocks: dict[int, DynamicLayer] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append one step's keys and values (B, heads, t, width) and return all of them."""
        layer = self._blocks.setdefault(layer_idx, _layer())
        keys, values = layer.update(key_states, value_states)
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many tokens earlier steps brought."""
        return self.seen

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Return (keys that a query of this step may see, offset of the first)."""
        query = args[0] if args else next(iter(kwargs.values()))
        length = query if isinstance(query, int) else int(query.shape[0])
        return self.seen + length, 0


def _layer() -> DynamicLayer:
    return DynamicLayer()  # type: ignore[no-untyped-call]


class CachedBottom:
    """A bottom with its cache, fed with one text in pieces.

    Args:
        bottom: of a causal language model.
    """

    def __init__(self, bottom: Bottom) -> None:
        self._bottom = bottom
        self._cache = HalfCache()

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        """Return the hidden states (1, t, d) of the next tokens (1, t)."""
        mask = torch.ones(1, self._cache.seen + ids.shape[1], dtype=torch.long)
        try:
            self._bottom.model(
                input_ids=ids, attention_mask=mask, past_key_values=self._cache, use_cache=True
            )
        except Reached as reached:
            self._cache.seen += ids.shape[1]
            return reached.hidden
        raise UnsupportedModelError("the model's forward never ran the block at the cut")


class CachedTop:
    """A top with its cache, fed with one text's hidden states in pieces.

    Args:
        top: of a causal language model.
    """

    def __init__(self, top: Top) -> None:
        self._top = top
        self._cache = HalfCache()

    @property
    def seen(self) -> int:
        """Tokens so far."""
        return self._cache.seen

    @torch.inference_mode()
    def step(self, hidden: Tensor) -> Tensor:
        """Return the logits (1, V), float32, after the last of the next tokens.

        Args:
            hidden: (1, t, d), what the bottom gave for them.

        Raises:
            ConfigError: if the shape is not (1, t, d).
        """
        if hidden.ndim != 3 or hidden.shape[0] != 1 or hidden.shape[2] != self._top.hidden_size:
            raise ConfigError(
                f"hidden {tuple(hidden.shape)}: must be (1, t, {self._top.hidden_size})"
            )
        parameter = next(self._top.parameters())
        count = int(hidden.shape[1])
        mask = torch.ones(1, self._cache.seen + count, dtype=torch.long, device=parameter.device)
        ids = torch.ones(1, count, dtype=torch.long, device=parameter.device)
        with self._top.slot.holding(hidden):
            logits: Tensor = self._top.model(
                input_ids=ids, attention_mask=mask, past_key_values=self._cache, use_cache=True
            ).logits
        self._cache.seen += count
        return logits[:, -1].float()


def check_cached_decoding(bottom: Bottom, top: Top) -> None:
    """Check on one short text that pieces give the logits that the whole text gives.

    Raises:
        UnsupportedModelError: the family's cache does not work across the cut; says by how much
            the logits differ.
    """
    if top.task != "causal-lm":
        raise ConfigError(f"task {top.task!r}: must be causal-lm to be run token by token")
    ids = (torch.arange(7)[None] * 5 + 3) % bottom.vocab  # (1, 7)
    with probing(bottom, top), torch.inference_mode():
        whole = top(bottom(ids), None)  # (1, 7, V)
        below, above = CachedBottom(bottom), CachedTop(top)
        worst = 0.0
        try:
            for first, end in ((0, 4), (4, 5), (5, 7)):
                logits = above.step(below.step(ids[:, first:end]))
                worst = max(worst, relative_difference(whole[:, end - 1].float(), logits))
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            raise UnsupportedModelError(
                f"{type(top.model).__name__}: its forward with a cache does not run when cut: "
                f"{type(error).__name__}: {error}"
            ) from error
    bound = TOLERANCE.get(next(top.parameters()).dtype, 3e-2)
    if not worst <= bound:
        raise UnsupportedModelError(
            f"{type(top.model).__name__}: token by token the logits differ by {worst:.3g} of the "
            f"largest: must be <= {bound:g}"
        )
