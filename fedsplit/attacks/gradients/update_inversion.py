"""A small batch's texts from its gradient: inputs are optimised until they cause it.

Deep leakage (Zhu et al., NeurIPS 2019, arXiv 1906.08935; for text with an added L1 term, TAG, arXiv
2103.06819).
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

from fedsplit.attacks.base import TokenAttack, Truth, View
from fedsplit.attacks.gradients.update_sets import tokens_from_embedding_update
from fedsplit.attacks.scoring import AttackResult, Inversion, score_tokens
from fedsplit.errors import AttackError, check
from fedsplit.models.anatomy import probe
from fedsplit.seeding import torch_generator


@dataclass(frozen=True)
class GradientInversion(TokenAttack):
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
    needs: ClassVar[tuple[str, ...]] = ("update",)
    knows: ClassVar[str] = (
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

    def applies(self, view: View) -> bool:
        """Return whether one batch's gradient, its shape and the model are known."""
        return super().applies(view) and not _incomplete(view)

    def read(self, view: View) -> Inversion:
        """Return the guesses for the batch, in the attacker's own order.

        Raises:
            AttackError: the gradient, the batch's shape, its labels or the model are missing.
        """
        lacking = _incomplete(view)
        if lacking:
            raise AttackError(f"{lacking}: must be known to the attack {self.name!r}")
        update, model = view.update, view.public.model
        assert update is not None, "checked"
        assert update.shape is not None, "checked"
        if hasattr(model, "set_attn_implementation"):
            model.set_attn_implementation("eager")  # differentiated twice
        model.eval()
        weight = probe(model).input_embeddings.get_parameter("weight")
        named = dict(model.named_parameters())
        names = [n for n in update.gradient if n in named and named[n] is not weight]
        table = weight.detach()
        moved = [n for n in update.gradient if named.get(n) is weight]
        candidates = None
        if moved:  # the rows that have a gradient are the batch's tokens
            candidates = tokens_from_embedding_update(table, table - update.gradient[moved[0]])
        labels = update.labels
        mask = torch.ones(update.shape, dtype=torch.int64)

        def loss(soft: Tensor) -> Tensor:
            out = model(inputs_embeds=soft, attention_mask=mask, labels=labels)
            found: Tensor = out.loss
            return found

        return self.invert(
            [update.gradient[n] for n in names],
            [named[n] for n in names],
            loss,
            table,
            update.shape,
            candidates,
        )

    def run(self, view: View, truth: Truth) -> AttackResult:
        """Read the batch, and score it in the order that fits best: a mean has none.

        Raises:
            AttackError: the view lacks something, or the truth is of another shape.
        """
        self.check(view)
        found = align_batch(self.read(view), truth.ids)
        return score_tokens(
            self.name,
            found,
            list(truth.ids),
            special_ids=view.public.special_ids,
            knowledge=self.knowledge,
            extra={"samples": len(truth.ids)},
        )

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
        return Inversion(top, time.perf_counter() - start)

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


def _incomplete(view: View) -> str:
    """Return what the view lacks for a batch to be read from its gradient."""
    update = view.update
    if update is None or not update.gradient:
        return "gradient"
    if update.shape is None or update.labels is None:
        return "the batch's shape and labels"
    return "" if view.public.model is not None else "the model"


def align_batch(inversion: Inversion, truth: Sequence[Tensor]) -> Inversion:
    """Return the guesses in the order of the samples that they fit best (for scoring alone).

    A mean over a batch has no order, so an attacker may name its samples as it likes.
    """
    right = np.array(
        [[int((g == t).sum()) for t in truth] for g in inversion.ids], dtype=np.int64
    )  # (guesses, samples)
    guess, sample = linear_sum_assignment(-right)
    of = dict(zip(sample.tolist(), guess.tolist(), strict=True))
    return Inversion([inversion.top[of[i]] for i in range(len(truth))], inversion.seconds)
