"""What received rows say of candidate states: log densities by the announced law of the noise."""

from __future__ import annotations

from torch import Tensor

from fedsplit.attacks.base import Public
from fedsplit.privacy.denoising.posterior import likelihood_of
from fedsplit.privacy.mechanisms.base import clip_rows

EXACT = 1e-3  # relative distance at which a row without noise counts as one unit of evidence


def lawful(public: Public) -> bool:
    """Return whether rows are clean, or clean ones plus noise of a known law."""
    mechanism = public.mechanism
    return mechanism is None or not mechanism.protects() or mechanism.adds_noise


class RowEvidence:
    """One text's rows, ready to be compared with clean states.

    Args:
        public: holds the mechanism and what it leaves with less noise.
        received: the rows, ``(T, d)``; :func:`lawful`.

    Attributes:
        exact: whether rows were received as they are: only the right token explains one.
    """

    def __init__(self, public: Public, received: Tensor) -> None:
        rows, mechanism = received.float(), public.mechanism
        self.exact = mechanism is None or not mechanism.protects()
        self._mechanism, self._whitener = mechanism, None
        if mechanism is None or not mechanism.protects():
            self._power = rows.square().sum(1) * EXACT**2 + 1e-12  # (T,)
        else:
            whitener = mechanism.whitener()
            self._whitener = None if whitener is None else whitener.float()
            rows = rows if self._whitener is None else rows @ self._whitener
            self._likelihood = likelihood_of(mechanism, rows.shape[1], public.touched)
        self._rows = rows

    def __call__(self, states: Tensor, first: int = 0) -> Tensor:
        """Return log p(rows from ``first`` on | clean states (n, t, d)), ``(n, t)``."""
        last = first + states.shape[1]
        if self._mechanism is None or self.exact:
            return -(states - self._rows[first:last]).square().sum(2) / self._power[first:last]
        flat = clip_rows(states.flatten(0, 1), self._mechanism.sent_norm).view_as(states)
        flat = flat if self._whitener is None else flat @ self._whitener
        found: Tensor = self._likelihood((flat - self._rows[first:last]).square().sum(2))
        return found
