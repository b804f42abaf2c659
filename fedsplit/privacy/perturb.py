"""One sample in, what may leave out: noise identity, contributing tokens, mechanism.

**Noise identity.**  The noise on a sample is a function of (secret, mechanism with its parameters,
representation identity, per-token multipliers, the sample's content, view) and of nothing else:

- *Same everything, same noise, for ever*: a second epoch, a restart or another run sends exactly
  the bytes that the server already has, and teaches it nothing.  Fresh noise would average away:
  the mean of v draws has its error divided by sqrt(v).
- *Any parameter differs, independent noise.*  One noise n reused under eta and eta/2 would send
  x1 = h + n and x2 = h + 2n, and the server would solve h = 2 x1 - x2 with no noise left.  The same
  holds for multipliers (h + n and h + rho n), for another bottom or split point (h1 + n and h2 + n
  give h1 - h2 exactly) and for another precision (the difference is how each coordinate of h was
  rounded, which tells the token).  Independent draws instead compose: their etas add up.
- *Two samples with the same text get the same noise*: the server sees that they are equal, and no
  second draw of the same vectors.

``view`` counts the fresh draws that cannot be avoided: when joint training moves the bottom, h
moves, and re-using n would leak the difference h_1 - h_0 exactly.  Every new view costs the
mechanism's full parameter once more.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

from fedsplit.errors import PrivacyError, check
from fedsplit.privacy.contributing_tokens import ContributingTokens
from fedsplit.privacy.mechanisms.base import Mechanism
from fedsplit.privacy.secret import OwnerSecret


def content_digest(token_ids: Tensor) -> bytes:
    """Return 32 bytes that identify a sample's content.

    Args:
        token_ids: integer, ``(T,)``, without padding: padding is no content.
    """
    ids = token_ids.detach().to("cpu", torch.int64).contiguous()
    return hashlib.sha256(ids.numpy().astype("<i8").tobytes()).digest()


class SamplePerturber:
    """An owner's perturbation of its samples, one by one, with a count of what was touched.

    What breaks it:
        Computing ``hidden`` with dropout on, or with another bottom under the same
        ``representation_id``: then h differs between calls and n does not, and the server learns
        the difference exactly.  The precision of the computation (autocast, quantised weights)
        belongs into ``representation_id``; the dtype of ``hidden`` is counted by itself.

    Args:
        mechanism: what noise.
        secret: the owner's.
        representation_id: identifies the map from tokens to ``hidden``: the bottom's digest and
            the split point.
        cti: contributing tokens, whose noise is scaled by ``rho``; None for none.
        rho: noise multiplier of contributing tokens, in [0, 1].

    Raises:
        ConfigError: if ``rho`` is out of range or ``representation_id`` empty.
    """

    def __init__(
        self,
        mechanism: Mechanism,
        secret: OwnerSecret,
        representation_id: str,
        cti: ContributingTokens | None = None,
        rho: float = 1.0,
    ) -> None:
        check(0.0 <= rho <= 1.0, "rho", rho, "within [0, 1] (noise multiplier)")
        check(bool(representation_id), "representation_id", representation_id, "non-empty")
        self.mechanism = mechanism
        self.representation_id = representation_id
        self.cti = cti
        self.rho = float(rho)
        self._secret = secret
        self._identity = json.dumps(mechanism.describe(), sort_keys=True, allow_nan=False)
        self._samples = 0
        self._tokens = 0
        self._touched = 0
        self._views: dict[bytes, tuple[int, int]] = {}  # content -> (last view, draws)

    def perturb(self, hidden: Tensor, token_ids: Tensor, view: int = 0) -> Tensor:
        """Return what may leave for one sample.

        Args:
            hidden: ``(T, d)``, the representations of ``token_ids``, without padding.
            token_ids: ``(T,)``.
            view: 0 for a frozen bottom; counts up each time a moved bottom sends again.

        Returns:
            ``(T, d)``.

        Raises:
            PrivacyError: if the shapes do not fit, ``view`` is negative, or the mechanism refuses.
        """
        if token_ids.dim() != 1 or hidden.dim() != 2 or hidden.shape[0] != token_ids.shape[0]:
            raise PrivacyError(
                f"hidden.shape={tuple(hidden.shape)}, token_ids.shape={tuple(token_ids.shape)}: "
                "must be (T, d) and (T,)"
            )
        if view < 0:
            raise PrivacyError(f"view={view}: must be >= 0 (number of earlier draws)")
        scale = self._multipliers(token_ids)
        content = content_digest(token_ids)
        stream = self._secret.stream(
            "fedsplit.privacy.sample.v1",
            self._identity,
            self.representation_id,
            str(hidden.dtype),
            b"" if scale is None else scale.numpy().astype("<f8").tobytes(),
            content,
            view,
        )
        out = self.mechanism.privatise_sample(hidden, token_ids, stream, scale)
        self._samples += 1
        self._tokens += token_ids.shape[0]
        self._touched += 0 if scale is None else int((scale < 1).sum())
        last, draws = self._views.get(content[:8], (-1, 0))
        self._views[content[:8]] = (view, draws + (view != last))
        return out

    def _multipliers(self, token_ids: Tensor) -> Tensor | None:
        """Return ``(T,)`` multipliers, or None where every token keeps its full noise."""
        if self.cti is None or self.rho == 1.0:
            return None
        scale = self.cti.multipliers(token_ids.cpu(), self.rho)
        return scale if bool((scale < 1).any()) else None

    @property
    def tokens_touched(self) -> int:
        """Tokens perturbed so far whose noise was reduced."""
        return self._touched

    @property
    def share_touched(self) -> float:
        """Share of the tokens perturbed so far whose noise was reduced (specials included)."""
        return self._touched / self._tokens if self._tokens else 0.0

    def report(self) -> dict[str, Any]:
        """Return what was done so far, JSON-able; ``views`` is the most draws of one sample."""
        draws = max((count for _, count in self._views.values()), default=0)
        return {
            "mechanism": self.mechanism.describe(),
            "representation_id": self.representation_id,
            "rho": self.rho,
            "calls": self._samples,
            "tokens": self._tokens,
            "tokens_touched": self._touched,
            "share_touched": self.share_touched,
            "views": draws,
            "guarantee": self.mechanism.guarantee(max(draws, 1)),
        }
