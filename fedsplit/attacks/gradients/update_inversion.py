"""What an averaged update tells: tokens from moved embedding rows, labels from a head's bias, texts
from matching gradients.

- A token embedding's gradient is zero in every row whose token is not in the batch, so a joint
  bottom's update names its tokens exactly (Fowl et al., ICLR 2023, arXiv 2201.12675).
- The gradient of a head's bias is the mean of softmax(z) - onehot(y), so its entries count the
  labels (iDLG, arXiv 2001.02610, for one sample; LLG, arXiv 2105.09369, for batches).
- Deep leakage (Zhu et al., NeurIPS 2019, arXiv 1906.08935; for text with an added L1 term, TAG,
  arXiv 2103.06819): inputs are optimised until they cause the observed gradient.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fedsplit.attacks.scoring import AttackResult, Inversion, wilson_interval
from fedsplit.errors import AttackError, check
from fedsplit.seeding import torch_generator


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


def label_counts_from_bias_gradient(
    gradient: Tensor, batch: int, mean_probability: Tensor | None = None
) -> Tensor:
    """Return how many samples of each label a batch had, ``(C,) -> (C,)``, summing to ``batch``.

    Args:
        gradient: of the mean loss with respect to the last layer's bias, ``(C,)``.
        batch: B.
        mean_probability: mean softmax of the model on public text, ``(C,)``; None: uniform, which
            is right for a new head.

    Raises:
        AttackError: for another shape.
    """
    if gradient.dim() != 1:
        raise AttackError(f"gradient.shape={tuple(gradient.shape)}: must be (C,)")
    check(batch >= 1, "batch", batch, ">= 1 (samples)")
    classes = len(gradient)
    p = torch.full((classes,), 1 / classes) if mean_probability is None else mean_probability
    expected = (batch * (p.double() - gradient.detach().cpu().double())).clamp(min=0)
    expected *= batch / expected.sum().clamp(min=1e-12)
    whole = expected.floor()
    missing = batch - int(whole.sum())
    whole[(expected - whole).argsort(descending=True)[:missing]] += 1
    return whole.long()


def score_token_set(found: Tensor, truth: Sequence[Tensor], seconds: float = 0.0) -> AttackResult:
    """Score ids read off an update: success is the share of the batch's distinct ids found.

    Precision is reported beside it; guessing that same number of ids at random is the baseline
    only where the vocabulary is known, so the baseline is 0 here.
    """
    start = time.perf_counter()
    real = torch.unique(torch.cat(list(truth)).cpu())
    hits = int(torch.isin(found.cpu(), real).sum())
    success = hits / max(1, len(real))
    return AttackResult(
        name="gradient:tokens",
        success=success,
        interval=wilson_interval(success, len(real)),
        tokens=len(real),
        baseline=0.0,
        top10=None,
        knowledge="the joint bottom's embedding before and after an owner's update",
        seconds=seconds + time.perf_counter() - start,
        extra={"precision": hits / max(1, len(found)), "metric": "recall of distinct tokens"},
    )


def score_label_counts(found: Tensor, truth: Tensor, seconds: float = 0.0) -> AttackResult:
    """Score counted labels: success is the share of the batch's labels that are accounted for."""
    real = torch.bincount(truth.cpu(), minlength=len(found))
    n = int(real.sum())
    success = int(torch.minimum(found.cpu(), real).sum()) / n
    return AttackResult(
        name="gradient:labels",
        success=success,
        interval=wilson_interval(success, n),
        tokens=n,
        baseline=int(real.max()) / n,
        top10=None,
        knowledge="the head's bias gradient and the batch size",
        seconds=seconds,
    )


@dataclass(frozen=True)
class GradientInversion:
    """The optimisation attack on a small batch's gradient, over relaxed token choices.

    Args:
        steps: at most, per restart.
        lr: of Adam, on the logits of the token choices.
        l1: weight of the L1 distance beside the squared one (TAG); 0 is the original DLG.
        restarts: independent starts; the one with the smallest gradient distance is kept.
        tolerance: stop once the squared distance is this small, relative to the gradient's own.
        seed: of the starting points.
        top_k: guesses ranked per token.
    """

    name: ClassVar[str] = "gradient"
    knowledge: ClassVar[str] = (
        "white box: the model, one batch's gradient, its labels and shape; from the embedding's "
        "moved rows, its tokens"
    )
    budget: ClassVar[tuple[str, ...]] = ("steps", "restarts")
    steps: int = 300
    lr: float = 0.1
    l1: float = 0.01
    restarts: int = 2
    tolerance: float = 1e-6
    seed: int = 0
    top_k: int = 10

    def __post_init__(self) -> None:
        for name in ("steps", "restarts", "top_k"):
            check(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        check(self.lr > 0, "lr", self.lr, "> 0")
        check(self.l1 >= 0, "l1", self.l1, ">= 0")

    def invert(
        self,
        gradients: Sequence[Tensor],
        parameters: Sequence[Tensor],
        loss: Callable[[Tensor], Tensor],
        table: Tensor,
        shape: tuple[int, int],
        candidates: Tensor | None = None,
    ) -> Inversion:
        """Guess the tokens of the batch whose gradient is known.

        Args:
            gradients: of the batch's mean loss, one per parameter.
            parameters: what they belong to, at the weights at which they were computed.
            loss: soft embeddings ``(B, T, d_e)`` to the batch's mean loss, twice differentiable
                (attention must be ``eager``).
            table: token embeddings ``(V, d_e)``.
            shape: (B, T).
            candidates: ids to decode to, for instance :func:`tokens_from_embedding_update`.

        Returns:
            Per sample the guesses; a mean over the batch has no order, see :func:`align_batch`.

        Raises:
            AttackError: if gradients and parameters do not fit.
        """
        start = time.perf_counter()
        if len(gradients) != len(parameters) or any(
            g.shape != p.shape for g, p in zip(gradients, parameters, strict=False)
        ):
            raise AttackError(f"gradients={len(gradients)}: must fit {len(parameters)} parameters")
        ids = torch.arange(len(table)) if candidates is None else candidates.cpu()
        rows = table.detach()[ids]  # (V', d_e)
        targets = [g.detach().float() for g in gradients]
        # Each parameter counts alike: the head's gradient is far larger than the first block's.
        power = [float(g.square().sum()) + 1e-20 for g in targets]
        best, best_distance = torch.empty(0), float("inf")
        for restart in range(self.restarts):
            found, distance = self._descend(targets, parameters, loss, rows, shape, power, restart)
            if distance < best_distance:
                best, best_distance = found, distance
            if best_distance <= self.tolerance:
                break
        order = best.flatten(0, 1).topk(min(self.top_k, len(rows)), dim=1).indices
        top = list(ids[order].view(*shape, -1).unbind(0))
        seconds = time.perf_counter() - start
        return Inversion(ids=[x[:, 0] for x in top], top=top, seconds=seconds)

    def _descend(
        self,
        targets: Sequence[Tensor],
        parameters: Sequence[Tensor],
        loss: Callable[[Tensor], Tensor],
        rows: Tensor,
        shape: tuple[int, int],
        power: Sequence[float],
        restart: int,
    ) -> tuple[Tensor, float]:
        """Return the choices' logits ``(B, T, V')`` that fit best, and their relative distance."""
        generator = torch_generator(self.seed, "attacks", "gradient", restart)
        logits = torch.randn(*shape, len(rows), generator=generator).requires_grad_()
        optimiser = torch.optim.Adam([logits], lr=self.lr)
        best, lowest = logits.detach().clone(), float("inf")
        for step in range(self.steps):
            # Choices sharpen: soft mixtures explain a gradient that no token causes.
            sharp = 1.0 + 4.0 * step / self.steps
            guess = torch.softmax(sharp * logits, dim=2) @ rows  # (B, T, d_e)
            found = torch.autograd.grad(loss(guess), list(parameters), create_graph=True)
            pairs = list(zip(found, targets, strict=True))
            squared = torch.stack(
                [(f - g).square().sum() / p for (f, g), p in zip(pairs, power, strict=True)]
            ).mean()
            absolute = torch.stack(
                [(f - g).abs().sum() / p**0.5 for (f, g), p in zip(pairs, power, strict=True)]
            ).mean()
            now = squared.item()
            if now < lowest:
                best, lowest = logits.detach().clone(), now
            if lowest <= self.tolerance:
                break
            (logits.grad,) = torch.autograd.grad(squared + self.l1 * absolute, [logits])
            optimiser.step()
        return best, lowest


def align_batch(inversion: Inversion, truth: Sequence[Tensor]) -> Inversion:
    """Return the guesses in the order of the samples that they fit best (for scoring alone).

    A mean over a batch has no order, so an attacker may name its samples as it likes.
    """
    right = np.array(
        [[int((g == t).sum()) for t in truth] for g in inversion.ids], dtype=np.int64
    )  # (guesses, samples)
    guess, sample = linear_sum_assignment(-right)
    of = dict(zip(sample.tolist(), guess.tolist(), strict=True))
    return Inversion(
        ids=[inversion.ids[of[i]] for i in range(len(truth))],
        top=[inversion.top[of[i]] for i in range(len(truth))],
        seconds=inversion.seconds,
    )
