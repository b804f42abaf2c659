"""What an honest gradient can be, and what is made of one that cannot.

With the head at the server an owner returns, for each row of logits, the gradient of its mean
loss over B targets.  What a row of it can be is the task's to say (:mod:`fedsplit.tasks`).  Of
cross-entropy it is ``(p - q) / B`` with p the softmax of what the server
sent and q a distribution over the classes (the label, or after randomised response the labels that
it may stand for), or zero where the row has no target.  Both are distributions, so

    an honest row's norm is at most ``sqrt(2) / B``.

Where labels are not protected q is one label, and the server can tell: rows that no label explains
are not used, and held against their owner.  What is left to a liar is to name wrong labels.

With the head at the owner a row is the gradient by a final hidden state: at most
``sqrt(2) L / B``, L being the Lipschitz constant of the owner's head, which the server does not
know; and protections that put noise on gradients have no bound.  There an owner's rows are cut to a
multiple of the median, over the owners of the step, of their largest rows (times B).

What breaks it: with fewer than three owners in a step the second bound does nothing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from fedsplit.config import RunConfig
from fedsplit.privacy.labels.table import head_at_owner, parts_of
from fedsplit.tasks import task_of
from fedsplit.wire.codecs import decode_rows, encode_rows

Key = TypeVar("Key")
Gradient = tuple[Tensor, float]  # rows (R, C) of an owner's mean loss, and its targets B

SLACK = 1.02  # rounding on the wire
FEWEST = 3
CHARGED = 2.0
"""Times the honest bound beyond which a row is held against its owner."""
BLATANT = 10.0
"""The same for the bound that is relative to other owners."""
CHUNK = 512


class GradientBounds:
    """Bounds the gradients of one run's steps.

    Args:
        config: of the run: task, label protection, codec, and ``robust.clip`` (0: nothing is done).
    """

    def __init__(self, config: RunConfig) -> None:
        parts = parts_of(config.labels.protection)
        owner_head = head_at_owner(config.labels.protection)
        noisy = any(part.changes_gradients() for part in parts)
        self._task = task_of(config)
        self._bound = self._task.row_bound or 0.0
        self._clip = config.robust.clip
        self._absolute = bool(self._bound) and not owner_head and not noisy
        relabelled = any(part.changes_labels() for part in parts)
        self._explained = self._absolute and not (relabelled and config.labels.debias)
        self._codec = config.session.logits_codec

    def __call__(
        self, sent: Sequence[tuple[Key, Gradient]], logits: Mapping[Key, Tensor]
    ) -> tuple[list[tuple[Key, Gradient]], dict[Key, str]]:
        """Return (gradients that are within the bounds, owner -> what is held against it).

        Honest gradients are returned as they are, bit for bit.

        Args:
            sent: of one step, by owner.
            logits: what each owner was sent, of its gradient's shape.
        """
        if not self._clip:
            return list(sent), {}
        charged: dict[Key, str] = {}
        found = []
        limit, most = self._limit([gradient for _, gradient in sent])
        for key, (rows, weight) in sent:
            if self._explained:
                rows, odd = self._explain(rows, weight, logits[key])
                if odd:
                    charged[key] = f"{odd} gradient rows that no label explains"
            norms = rows.norm(dim=1, keepdim=True)  # (R, 1)
            times = float(norms.max()) * weight / limit
            if times > most:
                charged[key] = f"a gradient row of {times:.3g} times the honest bound"
            if times > 1.0:
                rows = rows * (limit / weight / norms.clamp_min(1e-30)).clamp_max(1.0)
            found.append((key, (rows, weight)))
        return found, charged

    def _limit(self, gradients: Sequence[Gradient]) -> tuple[float, float]:
        """Return (bound on a row's norm times B, times it that are blatant)."""
        if self._absolute:
            return self._bound * SLACK, CHARGED
        peaks = [float(rows.norm(dim=1).max()) * weight for rows, weight in gradients]
        median = statistics.median(peaks) if len(peaks) >= FEWEST else 0.0
        return (self._clip * median, BLATANT / self._clip) if median else (math.inf, math.inf)

    def _explain(self, rows: Tensor, weight: float, logits: Tensor) -> tuple[Tensor, int]:
        """Return (rows with zeros where no label explains them, number of such rows)."""
        away = torch.cat(
            [
                self._distance(mine * weight, theirs)
                for mine, theirs in zip(
                    torch.split(rows, CHUNK), torch.split(logits, CHUNK), strict=True
                )
            ]
        )  # (R,)
        odd = (away > self._task.tolerance) & (rows.abs().amax(dim=1) > 0)
        if not bool(odd.any()):
            return rows, 0
        return torch.where(odd[:, None], torch.zeros(()), rows), int(odd.sum())

    def _distance(self, rows: Tensor, logits: Tensor) -> Tensor:
        """Return each row's distance (R,) from what some label makes of the logits, times B."""
        seen = logits.float().cpu()
        if self._codec != "fp32":  # the owner's softmax is of what came down the wire
            seen = decode_rows(encode_rows(seen, self._codec), seen.shape, self._codec)
        return self._task.unexplained(rows, seen)
