"""The labels' side of a session as a run's label protection makes it."""

from __future__ import annotations

from dataclasses import replace

import torch

from fedsplit.config import RunConfig
from fedsplit.models.splitting.heads import Head
from fedsplit.owners.label_recovery import LabelRecovery
from fedsplit.owners.measuring import LabelChannel
from fedsplit.owners.reports import SessionReport
from fedsplit.owners.samples import Samples
from fedsplit.owners.split.label_side import LabelSide
from fedsplit.owners.split.output import OutputReader
from fedsplit.privacy.labels.table import (
    GradientShield,
    build_protection,
    draw_labels,
    owner_trains_head,
    withholds_gradients,
)
from fedsplit.privacy.secret import OwnerSecret
from fedsplit.tasks import BALANCED, balanced_weights, task_of


def protected_labels(
    config: RunConfig,
    secret: OwnerSecret,
    train: Samples,
    chosen: Samples,
    vocabulary: int,
    *,
    mode: str = "train",
    head: Head | None = None,
    report: SessionReport | None = None,
    recovery: LabelRecovery | None = None,
) -> tuple[torch.Tensor | None, LabelSide]:
    """Return (training labels that anything may be derived from, the session's label side).

    With drawn labels, nothing but the draw ever sees the true ones of the training split: the
    choice of contributing tokens and the averages of a round would tell them too.

    Args:
        config: the run's settings.
        secret: the owner's, from which labels are drawn.
        train: the owner's training samples.
        chosen: the samples of a session that does not train.
        vocabulary: of the bottom.
        mode: ``train`` or ``evaluate``.
        head: the owner's; None: it is at the server.
        report: averages as they may leave.
        recovery: judges gradients before they leave.
    """
    protection, task = build_protection(config.labels), task_of(config)
    shown, transition, shield = train.labels, None, None
    if train.labels is not None and protection.changes_labels():
        classes = config.model.labels
        shown = draw_labels(protection, secret, train.texts, train.labels, classes)
        if config.labels.debias:
            transition = protection.transition(classes)
    withholds = withholds_gradients(config.labels.protection)
    if protection.changes_gradients() and not withholds and mode == "train":
        share = 0.0
        if shown is not None and task.exclusive:
            share = float(torch.eq(shown, 1).double().mean())
        shield = GradientShield(protection, secret, share)
    samples = replace(train, labels=shown) if mode == "train" else chosen
    if mode == "train" and config.train.class_weights == BALANCED:
        task.weigh(own_class_weights(samples, task.outputs or 0))
    reader = OutputReader(
        samples,
        classify=not task.per_token,
        head=head,
        trained=owner_trains_head(config),
        classes=task.outputs or vocabulary,
        exact=task.outputs is not None,
    )
    settings = {k: v for k, v in config.to_flat().items() if k.startswith("labels.")}
    side = LabelSide(
        reader,
        task=task,
        shield=shield,
        transition=transition,
        protection=settings,
        recovery=recovery,
        per_text=report is not None and report.per_text,
        withholds=withholds,
    )
    return shown, side


def own_class_weights(samples: Samples, classes: int) -> list[float]:
    """Return the weights of ``train.class-weights = "balanced"``, by an owner's own targets.

    Args:
        samples: those that it trains on; with drawn labels the draws.
        classes: C that the parties agreed on.
    """
    _, targets = samples.targets_of(range(len(samples)))
    return balanced_weights(targets, classes)


def label_channel(side: LabelSide, train: Samples) -> LabelChannel | None:
    """Return what a training session's gradients would tell of labels; None: none leave."""
    if side.withholds:
        return None
    truth = None if train.labels is None else side.task.truth(train.labels)
    if train.words is not None:  # not told apart text by text: each gradient tells all of its tags
        truth = torch.zeros(len(train), dtype=torch.int64)
    reader, lengths = side.reader, train.lengths
    return LabelChannel(
        side.told,
        width=reader.classes if reader.head is None else reader.head.hidden_size,
        rows=lambda slots: len(slots) if reader.per_sample else sum(lengths[s] for s in slots),
        truth=truth,
        protection=side.protection,
    )
