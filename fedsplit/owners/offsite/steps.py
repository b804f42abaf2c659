"""An owner's steps on its adapters: micro-batches, bfloat16, the proximal term, DP-SGD."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fedsplit.config import RunConfig
from fedsplit.emulators.lm import IGNORED, lm_loss, logits_of, target_counts
from fedsplit.errors import ModelError
from fedsplit.owners.split.settings import DpSettings, optimizer_of


class AdapterSteps:
    """One round's steps.  The optimizer starts anew each round: its moments are the owner's own.

    The objective of a step is the mean next-token loss over its blocks' targets, plus FedProx's
    ``mu / 2 |w - w_0|^2`` (Li et al., arXiv 1812.06127, eq. 2).

    With ``dp`` a block is a sample: the gradient of its own mean loss (the proximal term's in it)
    is bounded by ``dp.clip``, and noise is added to the sum (see
    :class:`~fedsplit.privacy.dp.optimizer.PrivateOptimizer`).

    Args:
        model: the emulator's, in training mode.
        parameters: those that are trained.
        config: the run's settings (groups ``train`` and ``offsite``).
        dp: of DP-SGD, or None.
        per_block: whether :attr:`losses` is kept.

    Attributes:
        losses: mean loss of each block of the last step (nats per token).

    Raises:
        ModelError: there is nothing to train.
        ConfigError: DP-SGD is asked for and Opacus is not installed.
    """

    def __init__(
        self,
        model: Any,
        parameters: Sequence[nn.Parameter],
        config: RunConfig,
        dp: DpSettings | None = None,
        *,
        per_block: bool = False,
    ) -> None:
        self.losses: list[float] = []
        self._per_block = per_block
        self._model = model
        self._parameters = list(parameters)
        self._offsite = config.offsite
        self._clip = config.train.clip
        self._start = [p.detach().clone() for p in self._parameters]
        train = config.train
        if not self._parameters:
            raise ModelError("emulator has 0 trainable parameters: must be >= 1")
        self._optimizer = optimizer_of(
            self._parameters, train.optimizer, train.lr, train.weight_decay
        )
        self._dp = dp
        self._taken = 0
        self._private = None if dp is None else dp.private(self._optimizer)

    def step(
        self, ids: Tensor, labels: Tensor, rate: float, positions: Tensor | None = None
    ) -> float:
        """Take one step and return the mean loss of its blocks in nats per token.

        Args:
            ids: the step's blocks (B, T).
            labels: what is to be predicted (B, T), see :func:`fedsplit.emulators.lm.lm_loss`.
            rate: learning rate.
            positions: of packed samples (B, T), see :mod:`fedsplit.emulators.packing`; else None.

        Raises:
            ModelError: a loss is not finite; no step is taken.
            PrivacyError: with DP-SGD: a gradient is not finite; no step is taken.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self.losses = []
        wanted = (labels != IGNORED).any(0).nonzero()
        end = max(2, 1 + int(wanted.max()) if len(wanted) else 0)  # behind it stands padding alone
        ids, labels = ids[:, :end], labels[:, :end]
        private = self._private is not None
        if positions is not None:
            assert not private, "refused by the settings' checks"
            loss = self._step(ids, labels, positions[:, :end])
        else:
            loss = self._step_privately(ids, labels) if private else self._step(ids, labels)
        self._optimizer.zero_grad(set_to_none=True)
        self._taken += 1
        return loss

    def spent(self) -> dict[str, float | int]:
        """Return what DP-SGD has cost up to here; empty without it."""
        return {} if self._dp is None else self._dp.spent(self._dp.earlier_steps + self._taken)

    def _step(self, ids: Tensor, labels: Tensor, positions: Tensor | None = None) -> float:
        self._optimizer.zero_grad(set_to_none=True)
        total, size = 0.0, self._offsite.micro_batch or len(ids)
        targets = int(target_counts(labels).sum())
        for at in range(0, len(ids), size):
            rows = slice(at, at + size)
            share = int(target_counts(labels[rows]).sum()) / targets
            placed = None if positions is None else positions[rows]
            loss = self._loss(ids[rows], labels[rows], placed)
            torch.autograd.backward([share * loss])
            total += share * float(loss.detach())
        if self._offsite.proximal:
            for parameter, start in zip(self._parameters, self._start, strict=True):
                pull = self._offsite.proximal * (parameter.detach() - start)
                parameter.grad = pull if parameter.grad is None else parameter.grad.add_(pull)
        if self._clip:
            nn.utils.clip_grad_norm_(self._parameters, self._clip)
        self._optimizer.step()
        return total

    def _step_privately(self, ids: Tensor, labels: Tensor) -> float:
        assert self._private is not None
        losses: list[float] = []
        self._private.step(self._parameters, self._gradients(ids, labels, losses), len(ids))
        return sum(losses) / len(losses)

    def _gradients(
        self, ids: Tensor, labels: Tensor, losses: list[float]
    ) -> Iterator[list[Tensor]]:
        """Yield each block's own gradients, one tensor per parameter."""
        mu = self._offsite.proximal
        for block, wanted in zip(torch.split(ids, 1), torch.split(labels, 1), strict=True):
            loss = self._loss(block, wanted)
            losses.append(float(loss.detach()))
            found = torch.autograd.grad(loss, self._parameters, allow_unused=True)
            yield [
                (torch.zeros_like(p) if g is None else g) + mu * (p.detach() - start)
                for g, p, start in zip(found, self._parameters, self._start, strict=True)
            ]

    def _loss(self, ids: Tensor, labels: Tensor, positions: Tensor | None = None) -> Tensor:
        with self._precision(ids.device.type):
            logits = logits_of(self._model, ids, positions)
        loss = lm_loss(logits, labels)
        if self._per_block:
            with torch.no_grad():
                each = lm_loss(logits, labels, "none").view(len(ids), -1).sum(1)
            self.losses += (each / target_counts(labels)).tolist()
        if not bool(torch.isfinite(loss)):
            raise ModelError(
                f"local loss {float(loss.detach())} at step {self._taken}: must be finite"
            )
        return loss

    def _precision(self, device: str) -> AbstractContextManager[Any]:
        return torch.autocast(device, torch.bfloat16) if self._offsite.bf16 else nullcontext()


def bounded(state: dict[str, Tensor], start: dict[str, Tensor], bound: float) -> dict[str, Tensor]:
    """Return ``state`` moved toward ``start`` until their distance is at most ``bound``.

    Args:
        state: tensors by name.
        start: the round's start, the same names and shapes.
        bound: on the L2 norm of the whole difference.
    """
    distance = sum(float((state[n] - start[n]).double().pow(2).sum()) for n in state) ** 0.5
    if distance <= bound:
        return state
    return {n: start[n] + (state[n] - start[n]) * (bound / distance) for n in state}
