"""What an owner reports of a session: averages with its own noise, or exact ones, or none.

With outputs that the server crafts, one exact average can carry the labels of many texts in its
digits.  With ``reports.epsilon`` in the owner's policy each text's loss is clipped and Laplace
noise from the owner's secret is added, so that a report is epsilon-DP for replacing one text.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedsplit.owners.home import in_simulation
from fedsplit.owners.ledger.reports import PRIVATE, is_private, sums_that_leave
from fedsplit.owners.policy.rules import Policy
from fedsplit.privacy.secret import OwnerSecret
from fedsplit.sums import is_sum

LOSS_CLIP = 8.0  # nats: bound on one text's mean loss in a noisy report
Metrics = dict[str, float | int]


class SessionReport:
    """Averages of one session as they may leave.

    Guarantee:
        With ``epsilon`` each report is epsilon-DP for replacing one text (in offsite tuning one
        block) and its label: each text's mean loss over the session is clipped to [0,
        ``LOSS_CLIP``], its share of right predictions is in [0, 1], both averages have sensitivity
        bound / n and an equal part of epsilon.  The number of texts is public (it stands in the
        session's first frame).  Reports compose by addition; the ledger keeps the sum.  Each has
        noise of its own: were it a function of what it hides, two outputs that differ for one
        label alone would be told apart by equal noise.

    Args:
        policy: the owner's; ``reports.allow``, ``reports.counts`` and ``reports.epsilon``.
        secret: of the noise.
    """

    def __init__(self, policy: Policy, secret: OwnerSecret) -> None:
        self.epsilon: float | None = policy.rules.get("reports.epsilon")
        self.allowed = bool(policy.rules.get("reports.allow", True))
        self._policy = policy
        self._secret = secret
        self._nonce = b"" if in_simulation() else secrets.token_bytes(16)
        self._sums: dict[int, tuple[int, float, float]] = {}  # text -> (uses, losses, right)

    @property
    def per_text(self) -> bool:
        """Whether :meth:`add` must be told of each text."""
        return self.allowed and self.epsilon is not None

    @property
    def texts(self) -> int:
        """Number of different texts added."""
        return len(self._sums)

    def add(self, slots: Sequence[int], per_text: Tensor) -> None:
        """Add one step.

        Args:
            slots: the step's texts.
            per_text: (B, 2), mean loss (nats) and share of right predictions of each.
        """
        for slot, (loss, right) in zip(slots, per_text.double().tolist(), strict=True):
            uses, losses, rights = self._sums.get(slot, (0, 0.0, 0.0))
            # Never NaN: what cannot be a loss counts as the bound.
            clipped = min(max(loss, 0.0), LOSS_CLIP) if math.isfinite(loss) else LOSS_CLIP
            self._sums[slot] = uses + 1, losses + clipped, rights + right

    def private(self, metrics: Mapping[str, float | int]) -> Metrics:
        """Return the metrics as they may leave."""
        if not self.allowed:
            return {key: value for key, value in metrics.items() if not is_private(key)}
        leave = sums_that_leave(self._policy, metrics)
        metrics = {k: value for k, value in metrics.items() if not is_sum(k) or k in leave}
        if self.epsilon is None:
            return dict(metrics)
        told = sorted(PRIVATE & metrics.keys())
        rows = torch.tensor([[a / n, b / n] for n, a, b in self._sums.values()] or [[0.0, 0.0]])
        exact = dict(zip(("loss", "accuracy"), rows.double().mean(0).tolist(), strict=True))
        found = dict(metrics)
        for key in told:
            bound = LOSS_CLIP if key == "loss" else 1.0
            scale = bound * len(told) / (self.epsilon * max(1, self.texts))
            noisy = exact[key] + scale * self._laplace(key, exact[key])
            found[key] = round(min(max(noisy, 0.0), bound), 4)
        return found

    def state(self) -> list[list[float]]:
        """Return what the next process needs, JSON-able."""
        return [[slot, *row] for slot, row in self._sums.items()]

    def load_state(self, state: Sequence[Sequence[float]]) -> None:
        """Continue where :meth:`state` was taken."""
        self._sums = {int(s): (int(n), float(a), float(b)) for s, n, a, b in state}

    def _laplace(self, key: str, exact: float) -> float:
        content: list[Any] = [self.epsilon, sorted(self._sums), exact]
        stream = self._secret.stream("fedsplit.report.v1", self._nonce, key, json.dumps(content))
        u = float(stream.uniform(1)[0]) - 0.5
        return -math.copysign(math.log1p(-2 * abs(u)), u)
