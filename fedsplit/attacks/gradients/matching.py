"""Relaxed texts fitted to what crossed: forward, backward, or both.

The scheme of TAG (Deng et al., arXiv 2103.06819), LAMP (Balunovic et al., arXiv 2202.08827) and
BiSR (Chen et al., arXiv 2409.00960): choices softmax(Z) of tokens are moved by gradient descent
until they explain the representations (through the public bottom) and the returned gradients
(through the head as the server knows it).  Started from the closed form it needs few steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from fedsplit.attacks.base import TokenAttack, View
from fedsplit.attacks.gradients.next_tokens import (
    RANKED,
    head_of,
    logits_of,
    of_language,
    reads_logits,
    unaided_guesses,
)
from fedsplit.attacks.gradients.token_recovery import GradientNoise, log_likelihood
from fedsplit.attacks.inversion.embeddings import embedding_table, soft_embeddings
from fedsplit.attacks.inversion.token_search import PrefixRunner, first_states
from fedsplit.attacks.scoring import Inversion
from fedsplit.errors import check, one_of
from fedsplit.models.modes import frozen
from fedsplit.seeding import torch_generator


@dataclass(frozen=True)
class Matching(TokenAttack):
    """The attack.

    Args:
        direction: ``forward``, ``backward`` or ``both``.
        loss: of gradients: ``tag`` (beta squared + (1 - beta) absolute differences) or ``cosine``.
        beta: see ``loss``.
        steps: of Adam.
        lr: of Adam, on Z.
        start: ``closed-form``, or ``random``.
        samples: read at most; 0 for all.
        seed: of random starts.
    """

    name: ClassVar[str] = "matching"
    needs: ClassVar[tuple[str, ...]] = ("steps",)
    uses: ClassVar[tuple[str, ...]] = ("rows",)
    knows: ClassVar[str] = "what crossed, both ways; the initial bottom and head; no law of noise"
    words: ClassVar[str] = "texts fitted to rows and gradients"
    budget: ClassVar[tuple[str, ...]] = ("direction", "loss", "steps", "lr", "start", "samples")
    direction: str = "both"
    loss: str = "tag"
    beta: float = 0.85
    steps: int = 60
    lr: float = 0.1
    start: str = "closed-form"
    samples: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("direction", self.direction, ("forward", "backward", "both"))
        one_of("loss", self.loss, ("tag", "cosine"))
        one_of("start", self.start, ("closed-form", "random"))
        check(0 <= self.beta <= 1, "beta", self.beta, "in [0, 1]")
        check(self.steps >= 1, "steps", self.steps, ">= 1")
        check(self.lr > 0, "lr", self.lr, "> 0")
        check(self.samples >= 0, "samples", self.samples, ">= 0 (0 = all)")

    def applies(self, view: View) -> bool:
        """Return whether gradients came back, and what they went through is known."""
        known = view.public.head is not None or reads_logits(view)
        known = known and of_language(view)
        return super().applies(view) and view.public.bottom is not None and known

    def read(self, view: View) -> Inversion:
        """Return the guesses; see :meth:`TokenAttack.read`."""
        start = time.perf_counter()
        count = min(len(view.steps), self.samples or len(view.steps))
        top, covers = [], []
        with frozen(view.public.bottom):
            public = view.public
            table = embedding_table(public.embedding, public.vocab, torch.device("cpu"))
            first = None
            if self._forward(view) and self.start != "random":
                runner = PrefixRunner(public.bottom, public.embedding)
                first = first_states(runner, public.vocab)
            for sample in range(count):
                z = self._start(view, sample, len(table), first)
                fitted = self._fit(view, sample, table, z)  # (T, V)
                top.append(fitted.topk(min(RANKED, fitted.shape[1]), dim=1).indices)
                read = torch.arange(len(fitted)) >= (0 if self._forward(view) else 1)
                covers.append(read)
        return Inversion(top, time.perf_counter() - start, covers)

    def unaided_guess(self, view: View) -> Sequence[Tensor]:
        """Return the model's own top-1 for what the server received."""
        return unaided_guesses(view)[: self.samples or None]

    def _forward(self, view: View) -> bool:
        return bool(view.rows) and self.direction != "backward"

    def _fit(self, view: View, sample: int, table: Tensor, z: Tensor) -> Tensor:
        """Return one text's choices, ``(T, V)``, from the start ``z``."""
        z.requires_grad_()
        optimiser = torch.optim.Adam([z], lr=self.lr)
        for _ in range(self.steps):
            chosen = z.softmax(1)
            loss = torch.zeros(())
            if self.direction != "forward":
                loss = loss + self._backward_loss(view, sample, chosen)
            if self._forward(view):
                loss = loss + self._forward_loss(view, sample, chosen @ table)
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
        return z.detach()

    def _start(self, view: View, sample: int, vocab: int, first: Tensor | None) -> Tensor:
        steps = view.steps[sample]
        length = len(steps[0].gradient)
        draw = torch_generator(self.seed, "attacks", "matching", sample)
        z = 0.1 * torch.randn(length, vocab, generator=draw)
        sure = math.log(vocab) - 2  # so that the start gives a token an eighth of the choice
        if first is not None:  # every token's state as a text's first, (V, d)
            z[0, (first - view.rows[sample][0].float()).square().sum(1).argmin()] += sure
        if self.start == "random" or self.direction == "forward" or length < 2:
            return z
        weight = None if reads_logits(view) else head_of(view).weight
        rows, logits = steps[0].gradient[:-1], logits_of(view, steps[0])
        found = log_likelihood(rows, logits, GradientNoise(), head=weight, targets=1)
        best = torch.cat([block.argmax(1) for block in found])
        z[torch.arange(1, length), best] += sure
        return z

    def _backward_loss(self, view: View, sample: int, chosen: Tensor) -> Tensor:
        """Return how far the gradients of ``chosen`` are from those that came back."""
        loss = torch.zeros(())
        for step in view.steps[sample]:
            wanted = step.gradient[:-1].float()
            found = logits_of(view, step).softmax(1) - chosen[1:]  # (T - 1, V)
            if not reads_logits(view):
                found = found @ head_of(view).weight
            if self.loss == "cosine":
                loss = loss + (1 - functional.cosine_similarity(found, wanted, dim=1)).mean()
                continue
            gap, size = found - wanted, wanted.norm(dim=1).mean().clamp(min=1e-12)
            squared, absolute = (gap / size).square().sum(1), (gap / size).abs().sum(1)
            loss = loss + (self.beta * squared + (1 - self.beta) * absolute).mean()
        return loss / max(1, len(view.steps[sample]))

    def _forward_loss(self, view: View, sample: int, soft: Tensor) -> Tensor:
        """Return how far the states of embeddings ``(T, d_e)`` are from the rows received."""
        rows = view.rows[sample].float()
        mask = torch.ones(1, len(rows), dtype=torch.long)
        with soft_embeddings(view.public.embedding) as slot:
            slot.append(soft.unsqueeze(0))
            states = view.public.bottom(torch.zeros_like(mask), mask)[0].float()
        gap: Tensor = (states - rows).square().sum(1) / rows.square().sum(1).clamp(min=1e-12)
        return gap.mean()
