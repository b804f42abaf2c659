"""From a run config, the owner's own files and a received bottom to a ready :class:`SplitOwner`."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from fedsplit.config import PrivacyConfig, RunConfig
from fedsplit.data import TextDataset
from fedsplit.models.bundle import unpack_bottom
from fedsplit.models.halves import Bottom
from fedsplit.owners.home import OwnerHome
from fedsplit.owners.plan import evaluation_steps, slot_order, train_steps
from fedsplit.owners.samples import Samples, tokenise
from fedsplit.owners.share import own_data, owner_name
from fedsplit.owners.split_owner import SplitOwner, SplitSettings
from fedsplit.privacy import SamplePerturber, select_contributing_tokens
from fedsplit.privacy.configured import build_mechanism
from fedsplit.privacy.cti import ContributingTokens
from fedsplit.privacy.secret import OwnerSecret

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OwnerIdentity:
    """Who this owner is, and where its state lives."""

    name: str
    home: OwnerHome
    secret: OwnerSecret
    node_config: Mapping[str, object]

    @classmethod
    def from_node(cls, config: RunConfig, node_config: Mapping[str, object]) -> OwnerIdentity:
        """Return the identity given by the node config and the machine.

        Raises:
            ConfigError: no usable name, or a home that cannot be written.
            PrivacyError: a noise secret that others can read, or a damaged one.
        """
        name = owner_name(node_config)
        home = OwnerHome.locate(dict(node_config), name)
        return cls(name, home, home.secret(config.seed, name), dict(node_config))


# Loading a bottom and tokenising take seconds and are the same for every message of a run; the
# caches save that where one process serves several messages, and nothing relies on them.
@lru_cache(maxsize=4)
def _bottom(folder: Path) -> tuple[Bottom, Any]:
    return unpack_bottom(folder)


@lru_cache(maxsize=16)
def _samples(
    data_digest: str, split: str, owner: str, folder: Path, labelled: bool, limits: tuple[int, int]
) -> list[Samples]:
    """Return a mutable cell per key; filled by the caller, which has the texts."""
    return []


def contributing_tokens(
    config: PrivacyConfig, samples: Samples, special: frozenset[int]
) -> ContributingTokens | None:
    """Return the owner's contributing tokens, or None where CTI is off or there are no labels."""
    if config.cti == "off" or config.mechanism == "none" or samples.labels is None:
        return None
    chosen = select_contributing_tokens(
        [x.tolist() for x in samples.ids],
        samples.labels.tolist(),
        statistic=config.cti,
        m=config.cti_per_class,
        max_share=config.cti_max_share,
        special_ids=special,
    )
    log.info("contributing tokens: %s", chosen.statement(config.cti_rho))
    return chosen


def prepare(
    config: RunConfig, identity: OwnerIdentity, digest: str, mode: str, round_: int
) -> SplitOwner:
    """Build the owner's side of one session.

    Args:
        config: the run's settings.
        identity: this owner.
        digest: the bottom's digest; its bundle must be in the owner's home.
        mode: ``train`` or ``evaluate``.
        round_: server round, from 1.

    Raises:
        DataError, ConfigError, ModelError, PrivacyError: whatever is wrong, before anything leaves.
    """
    labelled = config.model.task == "sequence-classification"
    folder = identity.home.bottom_dir(digest)
    bottom, tokenizer = _bottom(folder)
    train_set, test_set = own_data(config.data, config.seed, labelled, identity.node_config)
    train = _tokenised(config, identity, tokenizer, folder, "train", train_set)
    chosen = (
        train
        if mode == "train"
        else _tokenised(config, identity, tokenizer, folder, "test", test_set)
    )
    joint = config.split.bottom == "joint"
    mechanism = build_mechanism(config.privacy, bottom, bottom.vocab)
    special = frozenset(int(i) for i in tokenizer.all_special_ids)
    cti = contributing_tokens(config.privacy, train, special)
    perturber = SamplePerturber(
        mechanism,
        identity.secret,
        f"{digest}:{config.split.k}",
        cti,
        config.privacy.cti_rho if cti is not None else 1.0,
    )
    if mode == "train":
        batches, epochs = train_steps(len(chosen), config.train, config.seed, identity.name, round_)
        # A moved bottom needs a fresh draw; even views train, odd ones evaluate.
        views = [2 * epoch for epoch in epochs] if joint else [0] * len(batches)
    else:
        batches = evaluation_steps(len(chosen), config.train.batch_size)
        views = [2 * round_ + 1 if joint else 0] * len(batches)
    if joint:
        bottom = unpack_bottom(folder)[0]  # the cached one must stay as it was received
        for parameter in bottom.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
    settings = SplitSettings(
        mode=mode,
        joint=joint,
        codec=config.session.codec,
        logits_codec=config.session.logits_codec,
        bottom_lr=config.train.bottom_lr,
        optimizer=config.train.optimizer,
        weight_decay=config.train.weight_decay,
        clip=config.train.clip,
    )
    return SplitOwner(bottom, chosen, batches, views, perturber, settings)


def _tokenised(
    config: RunConfig,
    identity: OwnerIdentity,
    tokenizer: Any,
    folder: Path,
    split: str,
    texts: TextDataset,
) -> Samples:
    labelled = config.model.task == "sequence-classification"
    limits = (config.model.max_tokens, config.model.labels)
    cell = _samples(texts.digest, split, identity.name, folder, labelled, limits)
    if not cell:
        order = slot_order(identity.secret, split, len(texts))
        cell.append(
            tokenise(
                tokenizer,
                texts.texts,
                texts.labels if labelled else None,
                max_tokens=config.model.max_tokens,
                classes=config.model.labels,
                order=order,
            )
        )
    return cell[0]


def save_joint_state(owner: SplitOwner, folder: Path) -> None:
    """Keep the joint bottom's optimizer for the next message (its weights travel with Flower)."""
    optimizer = owner.optimizer
    if optimizer is None:
        return
    from safetensors.torch import save_file

    tensors = {}
    scalars: dict[str, float] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{key}"] = value.contiguous()
            else:
                scalars[f"{index}.{key}"] = float(value)
    draft = folder / "optimizer.draft"
    save_file(tensors, draft, metadata={"scalars": json.dumps(scalars)})
    draft.replace(folder / "optimizer.safetensors")


def load_joint_state(owner: SplitOwner, folder: Path) -> None:
    """Restore what :func:`save_joint_state` kept, if anything."""
    path = folder / "optimizer.safetensors"
    optimizer = owner.optimizer
    if optimizer is None or not path.exists():
        return
    from safetensors import safe_open

    state: dict[int, dict[str, Any]] = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  safe_open is no mapping
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = file.get_tensor(name)
        for name, value in json.loads((file.metadata() or {}).get("scalars", "{}")).items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = value
    whole = optimizer.state_dict()
    whole["state"] = state
    optimizer.load_state_dict(whole)
