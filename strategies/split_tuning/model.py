"""A base model cut in two for a run: what the server keeps, and what owners are sent.

Training and serving put it together here, so that what was trained is what is served.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from fedsplit.config import RunConfig
from fedsplit.models.adapters.trainable import (
    Trainable,
    make_trainable,
    method_options,
    trained_without_head,
)
from fedsplit.models.bundle.bottom import Bundle, pack_bottom
from fedsplit.models.bundle.head import with_head
from fedsplit.models.frozen_linear import AS_LOADED, recompute, store_frozen
from fedsplit.models.placing import place
from fedsplit.models.splitting.halves import Bottom, Top, split
from fedsplit.models.splitting.heads import Head, detach_head, positions_read
from fedsplit.models.trained.weights import Trained, load_owners
from fedsplit.privacy import build_mechanism
from fedsplit.privacy.labels.table import averages_head, head_at_owner, tail_blocks
from fedsplit.settings import check_settings
from fedsplit.tasks import task_of

from ..base_model import AUTOCASTS, DTYPES, load_base, read_base
from .denoising import CohortDenoiser, build_denoiser
from .gradient_denoising import GradientDenoiser, build_gradient_denoiser
from .top_step import TopRows


@dataclass
class Halves:
    """A base model just after the cut, on the CPU and nothing of it chosen for training.

    Attributes:
        digest: of the base model's files.
        tokenizer: of the base.
        bottom: what owners run.
        top: what the server runs.
        head: the head, where it is the owners' and no longer the top's; else None.
    """

    digest: str
    tokenizer: Any
    bottom: Bottom
    top: Top
    head: Head | None


@dataclass
class SplitModel:
    """A cut model, ready to be trained or served.

    Attributes:
        base_digest: of the base model's files.
        top: placed on its device.
        trainable: its trained part.
        bundle: the bottom's files (with the owners' head, if they hold it) and their digest.
        denoise: the server's estimate of what the owners' noise hides, or None.
        denoise_gradients: the same of the noise on their gradients, or None.
        head: the owners' head as it starts, or None.
    """

    base_digest: str
    top: Top
    trainable: Trainable
    bundle: Bundle
    denoise: CohortDenoiser | None
    denoise_gradients: GradientDenoiser | None
    head: Head | None

    @property
    def positions(self) -> str:
        """Which final hidden states the owners' head reads; empty: the head is the top's."""
        return "" if self.head is None else positions_read(self.head)

    @property
    def tail(self) -> int:
        """How many last blocks the owners hold."""
        return 0 if self.head is None else self.head.blocks


def load_halves(config: RunConfig) -> Halves:
    """Load the base model and cut it.

    Raises:
        ModelError, UnsupportedModelError, ConfigError: see :func:`strategies.base_model.load_base`.
    """
    config = check_settings(config)
    read = read_base(config, config.split.k)
    if read is None:
        loaded = load_base(config)
        bottom, top = split(loaded.model, config.split.k)
        digest, tokenizer = loaded.digest, loaded.tokenizer
    else:
        bottom, top, digest, tokenizer = read.bottom, read.top, read.digest, read.tokenizer
    head = None
    if head_at_owner(config.labels.protection):
        head = detach_head(top, blocks=tail_blocks(config.labels))
    return Halves(digest, tokenizer, bottom, top, head)


def assemble(config: RunConfig, halves: Halves, trained: Trained | None = None) -> SplitModel:
    """Choose what is trained, pack what owners get, and place the top.

    Args:
        config: the run's settings.
        halves: from :func:`load_halves`; changed in place.
        trained: weights of an earlier run to start from.

    Raises:
        ConfigError: settings that do not go together.
        ModelError: ``trained`` does not fit the model.
    """
    bottom, top, head = halves.bottom, halves.top, halves.head
    if trained is not None:
        load_owners(trained.owners, bottom, head)
    bundle = pack_bottom(bottom, halves.tokenizer)
    if head is not None:
        bundle = with_head(bundle, head)
    mechanism = build_mechanism(
        config.privacy,
        bottom,
        bottom.vocab,
        halves.tokenizer,
        frozen=config.split.bottom == "frozen",
    )
    denoise = build_denoiser(config, bottom, halves.tokenizer, mechanism)
    denoise_gradients = build_gradient_denoiser(config, head)
    trainable = _choose_trained(config, halves)
    if trained is not None:
        trainable.load(trained.top)
    _place(config, top, config.server.device_of(0) or config.model.device)
    return SplitModel(halves.digest, top, trainable, bundle, denoise, denoise_gradients, head)


def _choose_trained(config: RunConfig, halves: Halves) -> Trainable:
    if config.server.frozen_weights != AS_LOADED:
        store_frozen(halves.top, config.server.frozen_weights)
    trainable = make_trainable(halves.top, config.train.method, **method_options(config.train))
    return trainable if halves.head is None else trained_without_head(trainable)


def _place(config: RunConfig, top: Top, device: str) -> None:
    place(top, device, DTYPES[config.model.dtype])
    top.autocast = AUTOCASTS[config.model.autocast]
    if config.server.checkpointing:
        recompute(top)


def top_rows(config: RunConfig, top: Top, head: Head | None) -> TopRows:
    """Return what computes the rows that go down to owners."""
    positions = "" if head is None else positions_read(head)
    per_token = positions == "all" if positions else task_of(config).per_token
    return TopRows(top, positions, 0 if head is None else head.blocks, per_token)


def build_replica(config: RunConfig, worker: int) -> TopRows:
    """Load and cut the base model for a worker of the top, on its own device.

    Raises:
        ConfigError, ModelError, UnsupportedModelError: see :func:`load_halves`.
    """
    halves = load_halves(config)
    _choose_trained(config, halves)
    _place(config, halves.top, config.server.device_of(worker) or config.model.device)
    return top_rows(config, halves.top, halves.head)


def owners_parameters(
    config: RunConfig, bottom: Bottom, head: Head | None = None
) -> dict[str, nn.Parameter]:
    """Return what owners train and the server averages, by name; often nothing.

    Args:
        config: the run's settings.
        bottom: as owners receive it.
        head: the same, where it is theirs.
    """
    named: dict[str, nn.Parameter] = {}
    if config.split.bottom == "joint":
        named |= dict(bottom.named_parameters())
    if head is not None and averages_head(config):
        named |= {f"head.{name}": p for name, p in head.named_parameters()}
    return {name: p for name, p in named.items() if p.is_floating_point()}
