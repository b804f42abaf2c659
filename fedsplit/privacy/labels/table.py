"""What an owner does about its labels: the table of protections, and how they are applied."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedsplit.config import LabelsConfig
from fedsplit.privacy.labels.base import LabelProtection, Unprotected
from fedsplit.privacy.labels.marvell import Marvell
from fedsplit.privacy.labels.max_norm import MaxNorm
from fedsplit.privacy.labels.randomised_response import RandomisedResponse
from fedsplit.privacy.perturb import content_digest
from fedsplit.privacy.secret import OwnerSecret
from fedsplit.registry import pick

# setting -> protection.  Where the head is (client-head) is no row: it goes with any of them.
LABEL_PROTECTIONS: dict[str, Callable[[LabelsConfig], LabelProtection]] = {
    "none": lambda config: Unprotected(),
    "randomised-response": lambda config: RandomisedResponse(config.epsilon),
    "marvell": lambda config: Marvell(config.noise_power),
    "max-norm": lambda config: MaxNorm(),
}


def build_protection(config: LabelsConfig) -> LabelProtection:
    """Return the configured protection.

    Raises:
        ConfigError: unknown protection or a parameter out of range.
    """
    return pick(LABEL_PROTECTIONS, config.method, "labels.protection")(config)


def draw_labels(
    protection: LabelProtection,
    secret: OwnerSecret,
    ids: Sequence[Tensor],
    labels: Tensor,
    classes: int,
) -> Tensor:
    """Return the labels that training uses, drawn once per row for ever.

    The stream belongs to the protection, C, the text's content, its occurrence among equal texts
    and the label: an epoch, a restart or another run repeats the draw, equal rows have draws of
    their own, and a corrected label is drawn independently of the wrong one.

    Args:
        protection: what is done to labels.
        secret: the owner's.
        ids: token ids of every row, in slot order.
        labels: true labels, (N,).
        classes: C that the parties agreed on.
    """
    identity = json.dumps(protection.describe(), sort_keys=True)
    seen: Counter[bytes] = Counter()
    drawn = []
    for row, label in zip(ids, labels.tolist(), strict=True):
        text = content_digest(row)
        context = ("fedsplit.labels.v1", identity, classes, text, seen[text], int(label))
        drawn.append(protection.relabel(int(label), classes, secret.stream(*context)))
        seen[text] += 1
    return torch.tensor(drawn, dtype=torch.int64)


class GradientShield:
    """Applies a protection to each step's gradients, with noise that belongs to their content.

    The same gradients get the same noise for ever, whatever the step or run: a restart repeats
    itself, and a server that sends the same output again learns nothing new.  Any difference in
    gradients, labels or parameters draws independently.

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

    def __call__(self, rows: Tensor, labels: Tensor, slots: Sequence[int]) -> Tensor:
        """Return what may leave instead of ``rows``.

        Args:
            rows: one gradient per sample, (N, d).
            labels: (N,).
            slots: the samples, (N,).

        Raises:
            PrivacyError: see :meth:`LabelProtection.perturb`.
        """
        content = hashlib.sha256(rows.detach().float().contiguous().numpy().tobytes())
        content.update(labels.to(torch.int64).contiguous().numpy().tobytes())
        stream = self._secret.stream(
            "fedsplit.labels.gradient.v1",
            self._identity,
            content.digest(),
            *(int(slot) for slot in slots),
            str(self._share),
        )
        return self.protection.perturb(rows, labels, self._share, stream)
