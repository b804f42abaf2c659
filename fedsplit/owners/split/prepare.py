"""From a run config, the owner's own files and a received bottom to a ready :class:`SplitOwner`."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from fedsplit.config import RunConfig
from fedsplit.config.schedule import rate_factor
from fedsplit.data import TextDataset, docstrings_are_public
from fedsplit.errors import ModelError, SessionError
from fedsplit.models.bundle.bottom import Bundle, unpack_bottom
from fedsplit.models.bundle.head import HEAD_FILES, unpack_head, without_head
from fedsplit.models.positions import check_length
from fedsplit.models.splitting.halves import Bottom
from fedsplit.models.splitting.heads import Head
from fedsplit.models.splitting.representations import check_alone
from fedsplit.owners.data_source import own_data
from fedsplit.owners.home import in_simulation
from fedsplit.owners.identity import OwnerIdentity
from fedsplit.owners.label_draws import fix_draw
from fedsplit.owners.label_recovery import FILE as EVIDENCE
from fedsplit.owners.label_recovery import RULE as RECOVERY
from fedsplit.owners.label_recovery import LabelRecovery
from fedsplit.owners.measuring import OwnTexts
from fedsplit.owners.reports import SessionReport
from fedsplit.owners.samples import Samples, tokenise_set, tokenising
from fedsplit.owners.split.label_side import LabelSide
from fedsplit.owners.split.owner import SplitOwner
from fedsplit.owners.split.protected_labels import label_channel, protected_labels
from fedsplit.owners.split.schedule import evaluation_steps, passes_of, slot_order, train_steps
from fedsplit.owners.split.settings import DpSettings, SplitSettings
from fedsplit.owners.task import OwnerTask
from fedsplit.privacy import (
    SamplePerturber,
    build_mechanism,
    choose_tokens,
    mechanism_type,
)
from fedsplit.privacy.labels.table import (
    averages_head,
    build_protection,
    head_at_owner,
    tail_blocks,
)
from fedsplit.privacy.mechanisms.calibration import Store
from fedsplit.tasks import task_of

log = logging.getLogger(__name__)


# Loading a bottom and tokenising take seconds and are the same for every message of a run; the
# caches save that where one process serves several messages, and nothing relies on them.
@lru_cache(maxsize=4)
def _bottom(folder: Path) -> tuple[Bottom, Any]:
    bottom, tokenizer = unpack_bottom(folder)
    check_alone(bottom)
    largest = 0 if tokenizer is None else max(tokenizer.get_vocab().values(), default=0)
    if largest >= bottom.vocab:  # else the refusal of a text would tell that a word is in it
        raise ModelError(
            f"tokenizer's largest id {largest}: must be < {bottom.vocab}, the bottom's"
        )
    return bottom, tokenizer


@lru_cache(maxsize=4)
def _representation(folder: Path) -> str:
    """Return the digest of what representations depend on: another head is no other bottom."""
    if any((folder / name).exists() for name in HEAD_FILES):
        return without_head(Bundle.load(folder)).digest
    return folder.name


@lru_cache(maxsize=16)
def _samples(
    data_digest: str,
    split: str,
    owner: str,
    folder: Path,
    task: tuple[str, tuple[str, ...]],
    limits: tuple[int, int],
) -> list[Samples]:
    """Return a mutable cell per key; filled by the caller, which has the texts."""
    return []


def build_split_owner(task: OwnerTask) -> SplitOwner:
    """Build the owner's side of one session; the bottom's bundle must be in the owner's home.

    Raises:
        DataError, ConfigError, ModelError, PrivacyError, UnsupportedModelError: whatever is wrong,
            before anything leaves.
    """
    with tokenising:  # and, of several threads that want a bottom, one loads it
        return _build_split_owner(task)


def _build_split_owner(task: OwnerTask) -> SplitOwner:
    config, identity, offer = task.config, task.identity, task.offer
    mode, round_, folder = offer.mode, offer.round, task.bottom_folder
    if mode not in ("train", "evaluate"):
        raise SessionError(f"session mode {mode!r}: must be train or evaluate in split tuning")
    identity.home.evict("bottoms", folder.name, identity.node_config)
    bottom, tokenizer = _bottom(folder)
    check_length(bottom.model, config.model.max_tokens, "model.max-tokens")
    train_set, test_set = own_data(
        config, identity.node_config, identity.secret, identity.home.root
    )
    train = _tokenised(config, identity, tokenizer, folder, "train", train_set)
    chosen = train
    if mode != "train":
        chosen = _tokenised(config, identity, tokenizer, folder, "test", test_set)
    joint = config.split.bottom == "joint"
    report = SessionReport(task.check.policy, identity.secret)
    shown, side = _label_side(task, train, chosen, mode, report)
    perturber = _perturber(config, identity, folder, bottom, tokenizer, train, shown)
    passes = None
    if mode == "train":
        batches, epochs = train_steps(
            len(chosen), config.train, config.seed, identity.name, round_, shown
        )
        if config.train.sampler != "uniform":
            passes = passes_of(batches, len(chosen))
        views = len(set(epochs)) if joint else 1  # a bottom that moves shows new rows each time
    else:
        together = None if chosen.choices is None else chosen.choices.sizes
        batches, views = evaluation_steps(len(chosen), config.train.batch_size, together), 1
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
        head_rates=_head_rates(config, round_, len(batches)),
        optimizer=config.train.optimizer,
        weight_decay=config.train.weight_decay,
        clip=config.train.clip,
        views=views,
        weights_leave=joint or averages_head(config),
    )
    dp = None
    if mode == "train":
        secret = identity.secret
        dp = DpSettings.of_round(config, secret, len(train), round_, len(batches))
    samples = side.reader.samples
    labels = label_channel(side, train) if mode == "train" else None
    public = docstrings_are_public(_data_kind(task))
    own = OwnTexts(tokenizer, lambda: train, labels, config.model.max_tokens, public)
    return SplitOwner(bottom, samples, batches, perturber, settings, side, dp, report, own, passes)


def _data_kind(task: OwnerTask) -> str:
    if in_simulation():
        return task.config.data.kind
    return str(task.identity.node_config.get("data-kind", "file"))


def _perturber(
    config: RunConfig,
    identity: OwnerIdentity,
    folder: Path,
    bottom: Bottom,
    tokenizer: Any,
    train: Samples | None,
    shown: torch.Tensor | None,
) -> SamplePerturber:
    """Return the configured mechanism with the owner's secret and contributing tokens.

    Args:
        train: the owner's training samples; None where nothing is derived from them.
        shown: their labels, as far as anything may be derived from them.
    """
    cut = f"{_representation(folder)}:{config.split.k}"
    store = Store(identity.home.root / "calibration", cut)
    own = None if train is None else train.ids
    frozen = config.split.bottom == "frozen"
    mechanism = build_mechanism(
        config.privacy, bottom, bottom.vocab, tokenizer, own=own, store=store, frozen=frozen
    )
    cti = None if train is None else choose_tokens(config, train.ids, shown, tokenizer)
    if cti is not None:
        log.info("contributing tokens: %s", cti.statement(config.privacy.cti_rho))
    rho = config.privacy.cti_rho if cti is not None else 1.0
    return SamplePerturber(mechanism, identity.secret, cut, cti, rho)


@dataclass(frozen=True)
class InferenceParts:
    """What a text's representation is made with, outside of training."""

    bottom: Bottom
    tokenizer: Any
    perturber: SamplePerturber
    own: OwnTexts


def inference_parts(task: OwnerTask) -> InferenceParts:
    """Return bottom, tokenizer and mechanism as training had them; the bundle must be at home.

    The owner's training data is read only where the mechanism was derived from it: contributing
    tokens, or a covariance of its own.

    Raises:
        DataError, ConfigError, ModelError, PrivacyError: whatever is wrong, before anything leaves.
    """
    with tokenising:
        return _inference_parts(task)


def _inference_parts(task: OwnerTask) -> InferenceParts:
    config, identity, folder = task.config, task.identity, task.bottom_folder
    identity.home.evict("bottoms", folder.name, identity.node_config)
    bottom, tokenizer = _bottom(folder)
    check_length(bottom.model, config.model.max_tokens, "model.max-tokens")
    train, shown = None, None
    p = config.privacy
    mechanism = mechanism_type(p)
    if mechanism.protects() and (p.cti != "off" or mechanism.needs_own_text(p)):
        texts, _ = own_data(config, identity.node_config, identity.secret, identity.home.root)
        train = _tokenised(config, identity, tokenizer, folder, "train", texts)
        shown, _ = _label_side(task, train, train, "evaluate")
    perturber = _perturber(config, identity, folder, bottom, tokenizer, train, shown)
    samples = None
    if in_simulation() or identity.node_config.get("data-path"):

        def samples() -> Samples:
            texts, _ = own_data(config, identity.node_config, identity.secret, labelled=False)
            return tokenise_set(
                tokenizer,
                texts,
                task=None,
                max_tokens=config.model.max_tokens,
                order=slot_order(identity.secret, "train", len(texts)),
            )

    public = docstrings_are_public(_data_kind(task))
    own = OwnTexts(tokenizer, samples, None, config.model.max_tokens, public)
    return InferenceParts(bottom, tokenizer, perturber, own)


def received_head(config: RunConfig, folder: Path) -> Head | None:
    """Return the head that came with the bottom, where the owner is to hold it.

    Raises:
        ModelError: the head is to be the owner's, and the server sent none.
    """
    if not head_at_owner(config.labels.protection):
        return None
    head = unpack_head(folder)
    if head is None:
        asked = config.labels.protection
        raise ModelError(f"labels.protection={asked}: the server's bundle must bring the head")
    blocks = tail_blocks(config.labels)
    if head.blocks != blocks:
        raise ModelError(f"head of {head.blocks} block(s): must be labels.tail-blocks={blocks}")
    return head


def _label_side(
    task: OwnerTask,
    train: Samples,
    chosen: Samples,
    mode: str,
    report: SessionReport | None = None,
) -> tuple[torch.Tensor | None, LabelSide]:
    """Return (training labels that anything may be derived from, the session's label side).

    Raises:
        ModelError: the head is to be the owner's, and the server sent none.
        PolicyError: labels were drawn before, with something else.
    """
    config, identity, folder = task.config, task.identity, task.bottom_folder
    protection = build_protection(config.labels)
    if train.labels is not None and protection.changes_labels() and not in_simulation():
        root = identity.home.root
        fix_draw(root, identity.node_config, protection, config.model.labels)
    recovery, policy = None, task.check.policy
    if RECOVERY in policy and mode == "train":
        path = identity.home.root / EVIDENCE
        truth = None if train.labels is None else task_of(config).truth(train.labels)
        recovery = LabelRecovery(policy[RECOVERY], truth, train.texts, identity.secret, path)
    return protected_labels(
        config,
        identity.secret,
        train,
        chosen,
        _bottom(folder)[0].vocab,
        mode=mode,
        head=received_head(config, folder),
        report=report,
        recovery=recovery,
    )


def _head_rates(config: RunConfig, round_: int, steps: int) -> tuple[float, ...]:
    """Return the head's learning rate at each step of the round, on the server's schedule.

    The server counts progress over a wave's longest owner, an owner over its own steps.
    """
    train = config.train
    peak = (train.head_lr or train.lr) if task_of(config).labelled else train.lr
    return tuple(
        peak * rate_factor(train, (round_ - 1 + step / steps) / train.rounds)
        for step in range(steps)
    )


def _tokenised(
    config: RunConfig,
    identity: OwnerIdentity,
    tokenizer: Any,
    folder: Path,
    split: str,
    texts: TextDataset,
) -> Samples:
    key = (config.model.task, task_of(config).announced(config.model))
    limits = (config.model.max_tokens, config.model.labels)
    cell = _samples(texts.digest, split, identity.name, folder, key, limits)
    if not cell:
        order = slot_order(identity.secret, split, len(texts))
        cell.append(
            tokenise_set(
                tokenizer,
                texts,
                task=task_of(config),
                max_tokens=config.model.max_tokens,
                order=order,
                every_choice=split != "train",
            )
        )
    return cell[0]
