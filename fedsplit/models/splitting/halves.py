"""Splitting a model in two: the owner's bottom and the server's top.

Guarantee: ``top(bottom(ids, mask), mask)`` equals ``model(ids, mask).logits``, outputs and
gradients, for every supported family, with right and left padding, in evaluation mode (in training
mode too where dropout is 0: the halves draw their dropout separately).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedsplit.errors import ConfigError, UnsupportedModelError, check
from fedsplit.models.anatomy import probe, text_config
from fedsplit.models.modes import probing
from fedsplit.models.splitting.equivalence import check_equivalence, padded_batch
from fedsplit.models.splitting.structure import (
    Exit,
    Reached,
    Slot,
    ZeroEmbedding,
    cut,
    leave,
    leaves_of,
    mirror,
    strip,
)


class Bottom(nn.Module):
    """Embeddings and the first ``k`` blocks: what runs at the data owner.

    Holds no block >= k, no final norm and no head.

    Attributes:
        model: the Hugging Face base model, cut down.
        k: number of blocks.
        hidden_size: width d of what leaves.
        vocab: number of token ids that it accepts.
        task: of the whole it was cut from, if known.
    """

    def __init__(self, model: PreTrainedModel, k: int) -> None:
        super().__init__()
        self.model = model
        self.k = k
        self.task: str | None = None
        anatomy = probe(model)
        self.hidden_size = anatomy.hidden_size
        self.vocab = _rows(anatomy.input_embeddings)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return exactly what block k of the whole model would receive.

        Args:
            input_ids: token ids (B, T), integer.
            attention_mask: (B, T), 1 for tokens and 0 for padding on either side; None: no padding.

        Returns:
            Hidden states (B, T, d); positions under padding carry no meaning.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        try:
            self.model(input_ids=input_ids, attention_mask=attention_mask)
        except Reached as reached:
            return reached.hidden
        raise UnsupportedModelError("the model's forward never ran the block at the cut")


class Upper(nn.Module):
    """A model from some point on: hidden states in, logits out (shared by tops and heads).

    Attributes:
        model: the Hugging Face model, cut down.
        slot: where the hidden states wait for the block that takes them.
        hidden_size: width d of what enters.
        num_labels: C of a classifier, of texts or of tokens, else None.
        vocab: V of a language model, else None.
        per_token: whether it has a row of logits for every token, not one for every text.
        autocast: what matrix products are computed in while weights stay as they are; None = in
            the weights' own dtype.
    """

    def __init__(self, model: PreTrainedModel, slot: Slot) -> None:
        super().__init__()
        self.model = model
        self.slot = slot
        self.hidden_size = probe(model).hidden_size
        self.num_labels: int | None = None
        self.vocab: int | None = None
        self.per_token = False
        self.autocast: torch.dtype | None = None
        pad = text_config(model).pad_token_id
        self._pad = 0 if pad is None else int(pad)

    @property
    def task(self) -> str:
        """``causal-lm`` when it scores a vocabulary, else the classification of texts or tokens."""
        if self.vocab is not None:
            return "causal-lm"
        return "token-classification" if self.per_token else "sequence-classification"

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the logits for ``hidden``.

        Args:
            hidden: (B, T, d), moved and cast to this half's device and dtype; gradients flow back.
            attention_mask: (B, T), 1 for tokens and 0 for padding on either side; None: no padding.

        Returns:
            Logits (B, C), (B, T, C) or (B, T, V), float32 at least.  A decoder's classifier of
            texts pools the last position that the mask keeps (Hugging Face: the last token that is
            not the pad id, which differs only for texts that really contain the pad token).

        Raises:
            ConfigError: if the shapes are not (B, T, d) and (B, T).
        """
        mask = self._mask(hidden, attention_mask)
        with self.slot.holding(hidden), self._products(mask):
            logits: Tensor = self.model(input_ids=self._ids(mask), attention_mask=mask).logits
        return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits

    def _products(self, at: Tensor) -> AbstractContextManager[None]:
        if self.autocast is None:
            return nullcontext()
        context: AbstractContextManager[None] = torch.autocast(at.device.type, self.autocast)
        return context

    def _mask(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        if hidden.ndim != 3 or hidden.shape[-1] != self.hidden_size:
            raise ConfigError(f"hidden {tuple(hidden.shape)}: must be (B, T, {self.hidden_size})")
        # Offloaded parameters are on "meta"; accelerate then moves what enters by itself.
        real = (p.device for p in self.model.parameters() if not p.is_meta)
        device = next(real, hidden.device)
        if attention_mask is None:
            return torch.ones(hidden.shape[:2], dtype=torch.long, device=device)
        if attention_mask.shape != hidden.shape[:2]:
            raise ConfigError(
                f"attention_mask {tuple(attention_mask.shape)}: must be {tuple(hidden.shape[:2])}"
            )
        return attention_mask.to(device=device, dtype=torch.long)

    def _ids(self, mask: Tensor) -> Tensor:
        # Surrogates: what the family's code reads from ids (padding, where to pool) and no more.
        other = 1 if self._pad == 0 else 0
        return torch.where(mask.bool(), other, self._pad)

    def learn_outputs(self) -> set[int]:
        """Run a tiny batch; set ``num_labels``/``vocab``; return ids of the parameters it used.

        Of two heads with a row per token, a language model's is the one that the family calls its
        output embeddings.
        """
        mask = padded_batch(1, torch.device("cpu"))[1]
        reference = next(self.model.parameters())
        hidden = torch.randn(
            *mask.shape, self.hidden_size, generator=torch.Generator().manual_seed(0)
        ).to(reference.device, reference.dtype)
        with probing(self):
            logits = self(hidden.requires_grad_(), mask)
            used = leaves_of(logits)
        self.per_token = logits.ndim == 3
        outputs: Any = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        if self.per_token and outputs is not None:
            self.num_labels, self.vocab = None, int(logits.shape[-1])
        else:
            self.num_labels, self.vocab = int(logits.shape[-1]), None
        return used


class Top(Upper):
    """Blocks ``k`` and later with the head: what runs at the model owner.

    Holds no block < k and no embedding matrix, except where a tied head is that matrix.

    Attributes:
        k: index in the whole model of its first block.
    """

    def __init__(self, model: PreTrainedModel, slot: Slot, k: int) -> None:
        super().__init__(model, slot)
        self.k = k

    def hidden_states(
        self, hidden: Tensor, attention_mask: Tensor | None = None, *, tail: int = 0
    ) -> Tensor:
        """Return the final hidden states (B, T, d') before the head, in this half's dtype.

        Together with :func:`fedsplit.models.splitting.heads.detach_head`:
        ``head(top.hidden_states(h, mask, tail=head.blocks), mask) == top(h, mask)``.

        Args:
            hidden: (B, T, d).
            attention_mask: (B, T), see :meth:`forward`.
            tail: number of last blocks that are not run; what enters them is returned.

        Raises:
            ConfigError: if the shapes are not (B, T, d) and (B, T).
        """
        mask = self._mask(hidden, attention_mask)
        # The base model alone: whatever follows it (a large vocabulary, say) is not computed.
        with self.slot.holding(hidden), self._products(mask):
            last = self._last(mask, tail)
        return last if self.autocast is None else last.float()

    def _last(self, mask: Tensor, tail: int) -> Tensor:
        if not tail:
            output = self.model.base_model(input_ids=self._ids(mask), attention_mask=mask)
            return cast(Tensor, output.last_hidden_state)
        handle = probe(self.model).blocks[-tail].register_forward_pre_hook(leave, with_kwargs=True)
        try:
            self.model.base_model(input_ids=self._ids(mask), attention_mask=mask)
        except Reached as reached:
            return reached.hidden
        finally:
            handle.remove()
        raise UnsupportedModelError(f"the model's forward never ran its last {tail} blocks")


def split(
    model: PreTrainedModel, k: int, *, verify: bool = True, share_tied: bool = False
) -> tuple[Bottom, Top]:
    """Cut ``model`` before block ``k``.

    No weights are copied: the halves hold the model's own parameters (``.to()`` or an optimizer
    step on a half changes the model too), except those that both halves need (a tied head's matrix,
    MPNet's position bias), of which the top receives a copy.  Discard the whole afterwards, or
    leave it alone.

    Args:
        model: a Hugging Face classifier of texts or tokens, or a causal language model.
        k: number of blocks in the bottom, 0 <= k <= L - 1.
        verify: check that guarantee on a tiny padded batch before returning.
        share_tied: let both halves hold the same tensor where both need it.

    Returns:
        The bottom and the top.

    Raises:
        ConfigError: if ``k`` is out of range.
        UnsupportedModelError: if the model's blocks cannot be told, or the halves do not compute
            what the whole computes (says by how much).
    """
    anatomy = probe(model)
    bound = f"in 0..{anatomy.num_layers - 1} ({anatomy.num_layers} blocks, the last stays above)"
    check(isinstance(k, int) and 0 <= k < anatomy.num_layers, "k", k, bound)
    try:
        base = model.base_model
        assert isinstance(base, PreTrainedModel), "transformers' own invariant"
        bottom = make_bottom(base, k)
        top = make_top(model, k)
        bottom.task = top.task
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__}: its forward does not run when cut at k={k}: {error}"
        ) from error
    if not share_tied:
        _unshare(bottom, top)
    if verify:
        check_equivalence(model, bottom, top)
    return bottom, top


def make_bottom(base: PreTrainedModel, k: int) -> Bottom:
    """Cut a base model to its bottom, unverified; blocks from ``k`` on are never run."""
    anatomy = probe(base)
    kept = mirror(nn.ModuleList(list(anatomy.blocks)[:k]))
    half = cut(base, [*kept, Exit(anatomy.blocks[k])], slice(0, k + 1))
    bottom = Bottom(half, k)
    ids, mask = padded_batch(bottom.vocab, next(half.parameters()).device)
    with probing(bottom):
        used = leaves_of(bottom(ids, mask))
    strip(half, used)
    return bottom


def make_top(model: PreTrainedModel, k: int) -> Top:
    """Cut a model to its top, unverified; blocks before ``k`` are never run."""
    anatomy = probe(model)
    kept = mirror(nn.ModuleList(list(anatomy.blocks)[k:]))
    half = cut(model, list(kept), slice(k, None))
    slot = Slot()
    probe(half).blocks[0].register_forward_pre_hook(slot.before, with_kwargs=True)
    embedding = probe(half).input_embeddings
    assert isinstance(embedding, nn.Embedding), "verified by probe of the bottom"
    half.set_input_embeddings(ZeroEmbedding(embedding))
    top = Top(half, slot, k)
    strip(half, top.learn_outputs())
    return top


def _unshare(bottom: Bottom, top: Top) -> None:
    mine = {id(p) for p in bottom.parameters()}
    fresh: dict[int, nn.Parameter] = {}
    for module in top.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in mine:
                # One copy per tensor: what is tied inside the top stays tied inside the top.
                copy = fresh.setdefault(
                    id(parameter),
                    nn.Parameter(parameter.detach().clone(), parameter.requires_grad),
                )
                setattr(module, name, copy)


def _rows(embedding: nn.Module) -> int:
    rows = getattr(embedding, "num_embeddings", None)
    if not isinstance(rows, int):
        raise UnsupportedModelError(
            f"looked for an nn.Embedding of tokens, found {type(embedding).__name__}"
        )
    return rows
