"""Table of the label protections, and how an owner applies one."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from fedsplit.config import LabelsConfig, RunConfig
from fedsplit.errors import check
from fedsplit.privacy.labels.base import LabelProtection, Unprotected
from fedsplit.privacy.labels.client_head import ClientHead
from fedsplit.privacy.labels.client_tail import ClientTail
from fedsplit.privacy.labels.marvell import Marvell
from fedsplit.privacy.labels.max_norm import MaxNorm
from fedsplit.privacy.labels.randomised_response import RandomisedResponse
from fedsplit.privacy.labels.row_noise import RowNoise
from fedsplit.privacy.levels import PolicyBound
from fedsplit.privacy.secret import OwnerSecret
from fedsplit.tasks import task_type

LABEL_PROTECTIONS: dict[str, type[LabelProtection]] = {
    "none": Unprotected,
    "client-head": ClientHead,
    "client-tail": ClientTail,
    "randomised-response": RandomisedResponse,
    "marvell": Marvell,
    "max-norm": MaxNorm,
    "row-noise": RowNoise,
}


AUTO = "auto"


def protection_names() -> list[str]:
    """Return every value of ``labels.protection``: ``auto``, each row, and what goes with a head.

    Where the head is and what is done to labels or gradients are independent: a protection that
    only places the head combines, as ``A+B``, with one that changes labels or gradients.
    """
    rows = LABEL_PROTECTIONS.items()
    changing = [n for n, p in rows if p.changes_labels() or p.changes_gradients()]
    placing = [n for n, p in rows if p.owner_head and n not in changing]
    movable = [n for n in changing if not LABEL_PROTECTIONS[n].owner_head]
    movable.append(Unprotected.name)  # says that nothing is done beside
    return [AUTO, *LABEL_PROTECTIONS, *(f"{place}+{n}" for place in placing for n in movable)]


def parts_of(protection: str) -> list[type[LabelProtection]]:
    """Return the protections that a value of ``labels.protection`` names.

    Raises:
        ConfigError: no such protection, or two that do not combine.
    """
    known = protection_names()
    check(protection in known, "labels.protection", protection, "one of " + ", ".join(known))
    return [LABEL_PROTECTIONS[name] for name in said(protection).split("+")]


def said(protection: str) -> str:
    """Return what a value of ``labels.protection`` stands for: ``auto`` is ``none``."""
    return Unprotected.name if protection == AUTO else protection


def shows_text(config: RunConfig) -> bool:
    """Return whether gradients spell the owners' text: a language model's, with nothing done."""
    language = config.strategy == "split-tuning" and not task_type(config.model.task).labelled
    return language and not any(p.changes_gradients() for p in parts_of(config.labels.protection))


def head_at_owner(protection: str) -> bool:
    """Return whether the owner holds the head under a value of ``labels.protection``.

    Raises:
        ConfigError: as :func:`parts_of`.
    """
    return any(part.owner_head for part in parts_of(protection))


def withholds_gradients(protection: str) -> bool:
    """Return whether no gradient leaves under a value of ``labels.protection``.

    Raises:
        ConfigError: as :func:`parts_of`.
    """
    return any(part.withholds for part in parts_of(protection))


def tail_blocks(config: LabelsConfig) -> int:
    """Return how many last blocks the owner holds beside the head."""
    return config.tail_blocks if withholds_gradients(config.protection) else 0


def owner_trains_head(config: RunConfig) -> bool:
    """Return whether the owner holds the head and trains it.

    A language model's vocabulary projection alone is trained by the method ``all`` only.
    """
    labels = config.labels
    trained = task_type(config.model.task).labelled or config.train.method == "all"
    return head_at_owner(labels.protection) and (trained or tail_blocks(labels) > 0)


def keeps_weights(config: RunConfig) -> bool:
    """Return whether every owner keeps the tail that it trains; else tails are averaged."""
    return tail_blocks(config.labels) > 0 and config.labels.tail_weights == "own"


def averages_head(config: RunConfig) -> bool:
    """Return whether the weights of the owners' heads leave, to be averaged."""
    return owner_trains_head(config) and not keeps_weights(config)


def build_protection(config: LabelsConfig) -> LabelProtection:
    """Return what is done to labels or gradients; the head's place is :func:`head_at_owner`.

    Raises:
        ConfigError: unknown protection or a parameter out of range.
    """
    return parts_of(config.protection)[-1].from_settings(config)


def check_labels(config: RunConfig) -> None:
    """Refuse a label protection that does not fit the run.

    Raises:
        ConfigError: names the setting, its value and what it needs.
    """
    labels = config.labels
    parts = parts_of(labels.protection)
    for part in parts:
        part.check_settings(config)
    check(
        not labels.debias or any(part.changes_labels() for part in parts),
        "labels.debias",
        labels.debias,
        "false without randomised-response, whose transition matrix it corrects for",
    )


def label_bounds() -> dict[str, PolicyBound]:
    """Return every rule of a policy that bounds a label protection's level, by the rule's name."""
    levels = [p.level for p in LABEL_PROTECTIONS.values() if p.level is not None]
    return {level.bound.rule: level.bound for level in levels if level.bound is not None}


def draw_labels(
    protection: LabelProtection,
    secret: OwnerSecret,
    texts: Sequence[bytes],
    labels: Tensor,
    classes: int,
) -> Tensor:
    """Return the labels that training uses, drawn once per row for ever.

    The stream belongs to the protection, C, the raw text, its occurrence among equal texts and the
    label: an epoch, a restart, another run, tokenizer or bottom repeats the draw, equal rows have
    draws of their own, and a corrected label is drawn independently of the wrong one.

    Args:
        protection: what is done to labels.
        secret: the owner's.
        texts: what identifies the raw text of every row, in slot order.
        labels: true labels, (N,).
        classes: C that the parties agreed on.
    """
    identity = json.dumps(protection.describe(), sort_keys=True)
    seen: Counter[bytes] = Counter()
    drawn = []
    for text, label in zip(texts, labels.tolist(), strict=True):
        context = ("fedsplit.labels.v2", identity, classes, text, seen[text], int(label))
        drawn.append(protection.relabel(int(label), classes, secret.stream(*context)))
        seen[text] += 1
    return torch.tensor(drawn, dtype=torch.int64)


class GradientShield:
    """A protection of each step's gradients, with noise that belongs to what they answer.

    The same output gets the same noise for ever, whatever the step or run: a restart repeats
    itself, and a server that sends the same output again learns nothing new.  Any difference in
    outputs, gradients, labels or parameters draws independently.  Without the output in the key,
    two that round to the same gradient for one label, and not for another, would tell it by equal
    noise.

    Args:
        protection: what is done to gradients.
        secret: the owner's.
        share: of class 1 among all of the owner's training labels.
    """

    def __init__(self, protection: LabelProtection, secret: OwnerSecret, share: float) -> None:
        self.protection = protection
        self._secret = secret
        self._share = share
        self._identity = json.dumps(protection.describe(), sort_keys=True)

    def __call__(
        self, rows: Tensor, labels: Tensor, slots: Sequence[int], output: Tensor | None = None
    ) -> Tensor:
        """Return what may leave instead of ``rows``.

        Args:
            rows: one gradient per sample, (N, d).
            labels: (N, ...).
            slots: the samples, (N,).
            output: what the server sent and the gradients answer, every bit of it.

        Raises:
            PrivacyError: see :meth:`LabelProtection.perturb`.
        """
        content = hashlib.sha256(rows.detach().float().contiguous().numpy().tobytes())
        if output is not None:
            content.update(output.detach().double().contiguous().numpy().tobytes())
        kind = torch.float64 if labels.is_floating_point() else torch.int64
        content.update(labels.to(kind).contiguous().numpy().tobytes())
        stream = self._secret.stream(
            "fedsplit.labels.gradient.v1",
            self._identity,
            content.digest(),
            *(int(slot) for slot in slots),
            str(self._share),
        )
        return self.protection.perturb(rows, labels, self._share, stream)
