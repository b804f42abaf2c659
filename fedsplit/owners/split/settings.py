"""What an owner's session of split tuning does, and DP-SGD for what the owner trains itself."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class DpSettings:
    """DP-SGD for what the owner trains.

    Attributes:
        noise_multiplier: standard deviation in units of ``clip``, > 0.
        clip: bound on one sample's gradient norm.
        delta: of the reported (epsilon, delta).
        accountant: ``rdp`` or ``prv``.
        sample_rate: batch size / samples.
        earlier_steps: of the rounds before this one; an owner that missed some has spent less.
        secret: the noise's.
    """

    noise_multiplier: float
    clip: float
    delta: float
    accountant: str
    sample_rate: float
    earlier_steps: int
    secret: OwnerSecret
