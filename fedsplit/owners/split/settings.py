"""What an owner's session of split tuning does, and DP-SGD for what the owner trains itself."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from fedsplit.config import DpConfig, RunConfig
from fedsplit.owners.home import in_simulation
from fedsplit.privacy.dp.accounting import NoisySteps, spent_epsilon
from fedsplit.privacy.dp.optimizer import PrivateOptimizer
from fedsplit.privacy.secret import OwnerSecret


@dataclass(frozen=True)
class SplitSettings:
    """What one session of an owner does.

    Attributes:
        mode: ``train`` or ``evaluate``.
        joint: whether the bottom learns; then every batch is sent anew.
        codec: wire form of representations and their gradients.
        logits_codec: wire form of the server's output and its gradients.
        bottom_lr: learning rate of the bottom (joint).
        head_rates: learning rate of the owner's head at each step; empty: 1e-3 at every one.
        optimizer: ``adamw`` or ``sgd``, for what the owner trains.
        weight_decay: decoupled weight decay of it.
        clip: bound on the gradient norm of the bottom, and on that of the head, 0 = none.
        views: different noises of one text that the session may send.
        weights_leave: whether what is trained leaves after the session, to be averaged.
    """

    mode: str
    joint: bool
    codec: str
    logits_codec: str
    bottom_lr: float = 1e-5
    head_rates: tuple[float, ...] = ()
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    clip: float = 0.0
    views: int = 1
    weights_leave: bool = True


@dataclass(frozen=True)
class DpSettings:
    """DP-SGD for what the owner trains.

    Attributes:
        config: the run's, with a noise multiplier > 0.
        sample_rate: batch size / samples.
        earlier_steps: of the rounds before this one; an owner that missed some has spent less.
        secret: the noise's.
    """

    config: DpConfig
    sample_rate: float
    earlier_steps: int
    secret: OwnerSecret

    @classmethod
    def of_round(
        cls, config: RunConfig, secret: OwnerSecret | None, samples: int, round_: int, steps: int
    ) -> DpSettings | None:
        """Return the settings of a round of ``steps`` steps; None where no noise is asked for."""
        if not config.dp.noise_multiplier or secret is None:
            return None
        rate = min(1.0, config.train.batch_size / samples)
        return cls(config.dp, rate, (round_ - 1) * steps, secret)

    def private(self, optimizer: torch.optim.Optimizer) -> PrivateOptimizer:
        """Return an optimizer that clips and adds noise around another."""
        return PrivateOptimizer(
            optimizer,
            noise_multiplier=self.config.noise_multiplier,
            clip=self.config.clip,
            secret=self.secret,
            nonce=b"" if in_simulation() else secrets.token_bytes(16),
        )

    def noisy(self, batches: Iterable[Iterable[int]], parts: int = 1) -> NoisySteps:
        """Return what a session's noisy steps cost at most, for the owner's rules and ledger.

        Which samples a step is over follows from the seed, the batch size and the round, all of
        which the server names, and it may name the same again: it gains nothing on the server that
        steps are over a part of the samples.  Each step that a sample is in is one Gaussian
        mechanism of it; others are none.

        Args:
            batches: samples of each step.
            parts: releases in a step.
        """
        drawn = Counter(int(sample) for batch in batches for sample in batch)
        return NoisySteps(self.config.noise_multiplier, 1.0, parts * max(drawn.values()))

    def spent(self, steps: int) -> dict[str, float | int]:
        """Return what ``steps`` noisy steps, of all rounds up to now, have cost."""
        dp = self.config
        epsilon = spent_epsilon(
            dp.noise_multiplier, self.sample_rate, steps, dp.delta, dp.accountant
        )
        return {"dp-epsilon": epsilon, "dp-delta": dp.delta, "dp-steps": steps}


def optimizer_of(groups: Any, name: str, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Return the optimizer ``name`` (``adamw`` or ``sgd``) of parameters or parameter groups."""
    kind = torch.optim.SGD if name == "sgd" else torch.optim.AdamW
    return kind(groups, lr=lr, weight_decay=weight_decay)
