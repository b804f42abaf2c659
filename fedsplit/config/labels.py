"""The groups ``labels`` and ``dp``: what protects labels, and what an owner trains itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedsplit.config.bounds import one_of
from fedsplit.errors import check

if TYPE_CHECKING:
    from fedsplit.config.groups import ModelConfig, SplitConfig, TrainConfig

HEAD = "client-head"
METHODS = ("none", "randomised-response", "marvell", "max-norm")
# The head's place and what is done to labels or gradients are independent: both may be named.
PROTECTIONS = (*METHODS, HEAD, *(f"{HEAD}+{method}" for method in METHODS[1:]))


@dataclass(frozen=True)
class LabelsConfig:
    """What stands between the server and the owners' labels.

    Attributes:
        protection: ``none`` (the head is at the server, whose gradient shows every label),
            ``client-head`` (U-shape), ``randomised-response``, ``marvell``, ``max-norm``, or
            ``client-head+`` one of the last three (rows of
            ``fedsplit.privacy.labels.table.LABEL_PROTECTIONS``).
        epsilon: label-DP parameter of randomised response (nats).
        debias: correct the loss for randomised response's known transition matrix.
        noise_power: Marvell's budget s: expected squared noise norm per gradient, as a multiple of
            the squared distance between the two classes' mean gradients.
    """

    protection: str = "none"
    epsilon: float = 1.0
    debias: bool = False
    noise_power: float = 4.0

    def __post_init__(self) -> None:
        one_of("labels.protection", self.protection, PROTECTIONS)
        check(0 < self.epsilon <= 100, "labels.epsilon", self.epsilon, "in (0, 100] nats")
        good = self.noise_power > 0 and math.isfinite(self.noise_power)
        check(good, "labels.noise-power", self.noise_power, "> 0 and finite")

    @property
    def client_head(self) -> bool:
        """Whether the owner holds the head."""
        return self.protection.startswith(HEAD)

    @property
    def method(self) -> str:
        """What is done to labels or gradients: a row of ``LABEL_PROTECTIONS``."""
        if self.protection == HEAD:
            return "none"
        return self.protection.removeprefix(f"{HEAD}+")


@dataclass(frozen=True)
class DpConfig:
    """DP-SGD for what an owner trains itself: its head, its joint bottom.

    Attributes:
        noise_multiplier: standard deviation of the noise in units of ``clip``; 0 = off.
        clip: bound on one sample's gradient norm; replaces ``train.clip`` there.
        delta: of the (epsilon, delta) that is reported; below 1 / samples of an owner.
        accountant: ``rdp`` or ``prv`` (Opacus's).
    """

    noise_multiplier: float = 0.0
    clip: float = 1.0
    delta: float = 1e-5
    accountant: str = "rdp"

    def __post_init__(self) -> None:
        noise = self.noise_multiplier
        check(0 <= noise <= 1e6, "dp.noise-multiplier", noise, "in [0, 1e6]; 0 = off")
        check(0 < self.clip <= 1e6, "dp.clip", self.clip, "in (0, 1e6]")
        check(0 < self.delta < 1, "dp.delta", self.delta, "in (0, 1)")
        one_of("dp.accountant", self.accountant, ("rdp", "prv"))


def check_together(
    labels: LabelsConfig, dp: DpConfig, model: ModelConfig, split: SplitConfig, train: TrainConfig
) -> None:
    """Refuse settings that are right one by one and wrong together.

    Raises:
        ConfigError: names the setting, its value and what it needs.
    """
    classify = model.task == "sequence-classification"
    check(
        classify or labels.method == "none",
        "labels.protection",
        labels.protection,
        "none or client-head with model.task='causal-lm', whose labels are its text",
    )
    check(
        labels.method != "marvell" or model.labels == 2,
        "labels.protection",
        labels.protection,
        f"used with model.labels=2 (its optimum is for two classes, not {model.labels}); "
        "randomised-response and max-norm take any number",
    )
    check(
        not labels.debias or labels.method == "randomised-response",
        "labels.debias",
        labels.debias,
        "false without randomised-response, whose law it corrects for",
    )
    check(
        not labels.client_head or train.method != "head",
        "labels.protection",
        labels.protection,
        "used with a train.method that leaves the server something to train, not 'head'",
    )
    own = split.bottom == "joint" or (labels.client_head and (classify or train.method == "all"))
    check(
        dp.noise_multiplier == 0 or own,
        "dp.noise-multiplier",
        dp.noise_multiplier,
        "0 where owners train nothing themselves (split.bottom='joint' or a client head)",
    )
