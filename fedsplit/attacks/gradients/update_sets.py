"""What an averaged update names at once: tokens from moved embedding rows, labels from a head's
bias.

- A token embedding's gradient is zero in every row whose token is not in the batch, so a joint
  bottom's update names its tokens exactly (Fowl et al., ICLR 2023, arXiv 2201.12675).
- The gradient of a head's bias is the mean of softmax(z) - onehot(y), so its entries count the
  labels (iDLG, arXiv 2001.02610, for one sample; LLG, arXiv 2105.09369, for batches).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsplit.attacks.base import Attack, Truth, View
from fedsplit.attacks.scoring import AttackResult
from fedsplit.errors import AttackError, check
from fedsplit.models.anatomy import probe
from fedsplit.statistics import wilson_interval


def tokens_from_embedding_update(
    before: Tensor, after: Tensor, *, tolerance: float = 1e-4
) -> Tensor:
    """Return the ids whose embedding rows moved other than by weight decay, sorted, ``(n,)``.

    Decoupled weight decay shrinks every row by one common factor, which is estimated as the median
    over rows and taken out.

    Args:
        before: the embedding that was sent out, ``(V, d)``.
        after: the one that came back, or a mean of several, ``(V, d)``.
        tolerance: of a row's move, relative to the largest.

    Raises:
        AttackError: if the shapes differ.
    """
    if before.shape != after.shape or before.dim() != 2:
        raise AttackError(f"after={tuple(after.shape)}: must be {tuple(before.shape)}, (V, d)")
    start = before.detach().double()
    move = after.detach().double() - start
    power = start.square().sum(1)
    alive = power > 0
    if not bool(alive.any()):
        raise AttackError("before: all rows are 0: must be a model's embedding")
    decay = ((move * start).sum(1)[alive] / power[alive]).median()
    moved = (move - decay * start).norm(dim=1)
    if float(moved.max()) <= 1e-12:
        return torch.zeros(0, dtype=torch.int64)
    ids: Tensor = (moved > tolerance * moved.max()).nonzero().squeeze(1)
    return ids


def label_counts_from_bias_gradient(gradient: Tensor, batch: int) -> Tensor:
    """Return how many samples of each label a batch had, ``(C,) -> (C,)``, summing to ``batch``.

    The head is taken for a new one, whose mean softmax is uniform.

    Args:
        gradient: of the mean loss with respect to the last layer's bias, ``(C,)``.
        batch: B.

    Raises:
        AttackError: for another shape.
    """
    if gradient.dim() != 1:
        raise AttackError(f"gradient.shape={tuple(gradient.shape)}: must be (C,)")
    check(batch >= 1, "batch", batch, ">= 1 (samples)")
    classes = len(gradient)
    p = torch.full((classes,), 1 / classes).double()
    expected = (batch * (p - gradient.detach().cpu().double())).clamp(min=0)
    expected *= batch / expected.sum().clamp(min=1e-12)
    whole = expected.floor()
    missing = batch - int(whole.sum())
    whole[(expected - whole).argsort(descending=True)[:missing]] += 1
    return whole.long()


@dataclass(frozen=True)
class EmbeddingUpdate(Attack):
    """The attack: the distinct tokens of a joint bottom's round, from the embedding's moved rows.

    Success is the share of distinct true ids that were found, with precision beside it; guessing
    as many ids at random over the vocabulary is the guess to beat.

    Args:
        tolerance: see :func:`tokens_from_embedding_update`.
    """

    name: ClassVar[str] = "embedding_update"
    needs: ClassVar[tuple[str, ...]] = ("update",)
    knows: ClassVar[str] = "the joint bottom's embedding before and after an owner's update"
    tolerance: float = 1e-4

    def applies(self, view: View) -> bool:
        """Return whether weights before and after an update are known."""
        return super().applies(view) and view.update is not None and bool(view.update.after)

    def run(self, view: View, truth: Truth) -> AttackResult:
        """Read the set of tokens, and score it.

        Raises:
            AttackError: the update has no embedding, or there are no true tokens.
        """
        self.check(view)
        assert view.update is not None, "checked"
        start = time.perf_counter()
        before, after = (
            embedding_of(x, view.public.model) for x in (view.update.before, view.update.after)
        )
        found = tokens_from_embedding_update(before, after, tolerance=self.tolerance)
        seconds = time.perf_counter() - start
        if not truth.ids:
            raise AttackError("truth.ids: 0 samples: must be >= 1")
        real = torch.unique(torch.cat(list(truth.ids)).cpu())
        hits = int(torch.isin(found, real).sum())
        success = hits / len(real)
        return AttackResult(
            name=self.name,
            success=success,
            interval=wilson_interval(success, len(real)),
            tokens=len(real),
            baseline=len(found) / len(before),
            knowledge=self.knowledge,
            seconds=seconds,
            extra={"precision": hits / max(1, len(found)), "metric": "recall of distinct tokens"},
        )


@dataclass(frozen=True)
class BiasGradient(Attack):
    """The attack: a batch's label counts, from the gradient of the last layer's bias.

    Success is the share of the batch's labels that are accounted for.

    Args:
        parameter: name of the bias; empty: the one tensor ``(C,)`` whose name ends in ``bias`` and
            comes last.
    """

    name: ClassVar[str] = "bias_gradient"
    reads: ClassVar[str] = "labels"
    needs: ClassVar[tuple[str, ...]] = ("update",)
    knows: ClassVar[str] = "the head's bias gradient and the batch size"
    parameter: str = ""

    def applies(self, view: View) -> bool:
        """Return whether a batch's gradient is known."""
        return super().applies(view) and view.update is not None and bool(view.update.gradient)

    def run(self, view: View, truth: Truth) -> AttackResult:
        """Count the labels, and score the counts.

        Raises:
            AttackError: there is no such gradient, or no true labels.
        """
        self.check(view)
        assert view.update is not None, "checked"
        biases = [n for n in view.update.gradient if n.endswith("bias")]
        name = self.parameter or (biases[-1] if biases else "")
        if name not in view.update.gradient:
            raise AttackError(f"gradient/{name}: missing: must be the head's bias")
        if truth.labels is None or not len(truth.labels):
            raise AttackError("truth.labels: 0 labels: must be >= 1")
        start = time.perf_counter()
        n = len(truth.labels) if view.update.shape is None else view.update.shape[0]
        found = label_counts_from_bias_gradient(view.update.gradient[name], n)
        seconds = time.perf_counter() - start
        real = torch.bincount(truth.labels.cpu().long(), minlength=len(found))
        n = int(real.sum())
        success = int(torch.minimum(found, real).sum()) / n
        return AttackResult(
            name=self.name,
            success=success,
            interval=wilson_interval(success, n),
            tokens=n,
            baseline=int(real.max()) / n,
            knowledge=self.knowledge,
            seconds=seconds,
        )


def embedding_of(tensors: Mapping[str, Tensor], model: Any = None) -> Tensor:
    """Return the token embedding among a state's tensors, ``(V, d)``.

    Args:
        tensors: by name; a single matrix is taken whatever its name.
        model: whose embedding's shape is looked for; None: the longest matrix is taken.

    Raises:
        AttackError: there is none.
    """
    matrices = [t for t in tensors.values() if t.dim() == 2]
    if model is not None and len(matrices) > 1:
        shape = probe(model).input_embeddings.weight.shape
        matrices = [t for t in matrices if t.shape == shape]
    if not matrices:
        raise AttackError(f"update of {len(tensors)} tensors: must hold a token embedding (V, d)")
    return max(matrices, key=len)
