"""One sample in, what may leave out: noise identity, contributing tokens, mechanism.

**Noise identity.**  The noise on a sample is a function of (secret, mechanism with its parameters,
per-token multipliers, raw text, the very rows that it hides, view) and of nothing else:

- *Same text and same rows, same noise, for ever*: a second epoch, a restart or another run sends
  exactly the bytes that the server already has, and teaches it nothing.  Fresh noise would average
  away: the mean of v draws has its error divided by sqrt(v).
- *Any bit of the rows differs, independent noise.*  With one noise n on two rows h1 and h2 of a
  text the server would hold h1 - h2 exactly.  Whatever moved the rows, be it another bottom,
  tokenizer, cut, truncation, precision or number of threads, the rows themselves are in the key, so
  nothing that moves them can be forgotten.  A joint bottom that has moved draws anew; one that has
  not sends what it sent.
- *Any parameter differs, independent noise.*  One noise n reused under eta and eta/2 would send
  x1 = h + n and x2 = h + 2n, and the server would solve h = 2 x1 - x2 with no noise left.  The same
  holds for multipliers (h + n and h + rho n).  Independent draws instead compose: their etas add
  up.
- *Equal texts get equal noise*: the server sees that they are equal, and no second draw.

Each different draw of a text's noise is one *view*: it costs the mechanism's full parameter once
more, and the owner's ledger counts it by :attr:`View.noise`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
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


def rows_digest(rows: Tensor) -> bytes:
    """Return 32 bytes that identify every bit of ``rows``, of any shape and dtype."""
    raw = rows.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(raw.numpy().data).digest()


@dataclass(frozen=True)
class View:
    """What may leave of one sample.

    Attributes:
        rows: ``(T, d)``.
        noise: names the draw: equal names are equal noise on equal rows of an equal text.  Keyed:
            it tells nothing without the secret.
    """

    rows: Tensor
    noise: bytes


class SamplePerturber:
    """An owner's perturbation of its samples, one by one, with a count of what was touched.

    What breaks it:
        Computing ``hidden`` with dropout on, or in batches whose padding or size moves its last
        bits: every call then draws new noise, and each draw is a view that adds up.

    Args:
        mechanism: what noise.
        secret: the owner's.
        representation_id: names the map from tokens to ``hidden`` in reports and ledgers: the
            bottom's digest and the split point.  The noise does not depend on it.
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
        self._views: dict[bytes, set[bytes]] = {}  # text -> its draws

    def perturb(
        self, hidden: Tensor, token_ids: Tensor, view: int = 0, text: bytes = b""
    ) -> Tensor:
        """Return what may leave for one sample; see :meth:`view`."""
        return self.view(hidden, token_ids, text, view).rows

    def view(self, hidden: Tensor, token_ids: Tensor, text: bytes = b"", fresh: int = 0) -> View:
        """Return what may leave for one sample, with the name of its noise.

        Args:
            hidden: ``(T, d)``, the representations of ``token_ids``, without padding.
            token_ids: ``(T,)``.
            text: identifies the raw text; empty: the token ids do.
            fresh: any other number asks for another draw of the same rows.  An owner never does.

        Raises:
            PrivacyError: if the shapes do not fit, ``fresh`` is negative, or the mechanism refuses.
        """
        if token_ids.dim() != 1 or hidden.dim() != 2 or hidden.shape[0] != token_ids.shape[0]:
            raise PrivacyError(
                f"hidden.shape={tuple(hidden.shape)}, token_ids.shape={tuple(token_ids.shape)}: "
                "must be (T, d) and (T,)"
            )
        if fresh < 0:
            raise PrivacyError(f"view={fresh}: must be >= 0 (number of earlier draws)")
        text = text or content_digest(token_ids)
        scale = self._multipliers(token_ids)
        hides = self.mechanism.covered(hidden, token_ids)
        context = (
            self._identity,
            str(hidden.dtype),
            b"" if scale is None else scale.numpy().astype("<f8").tobytes(),
            text,
            f"{tuple(hides.shape)} {hides.dtype}",
            rows_digest(hides),
            fresh,
        )
        stream = self._secret.stream("fedsplit.privacy.sample.v2", *context)
        rows = self.mechanism.privatise_sample(hidden, token_ids, stream, scale)
        noise = self._secret.name("fedsplit.privacy.sample.v2", *context)
        self._samples += 1
        self._tokens += token_ids.shape[0]
        self._touched += 0 if scale is None else int((scale < 1).sum())
        self._views.setdefault(text[:8], set()).add(noise[:8])
        return View(rows, noise)

    def trial(self, hidden: Tensor, token_ids: Tensor, text: bytes, number: int) -> Tensor:
        """Return what might leave for one sample, in noise that nothing which leaves has.

        The noise belongs to the secret, the text and ``number`` alone: a measurement that is made
        again with other rows is not another draw of luck.  What is returned must not leave.

        Args:
            hidden: ``(T, d)``.
            token_ids: ``(T,)``.
            text: identifies the raw text.
            number: of the trial.
        """
        stream = self._secret.stream("fedsplit.privacy.trial.v1", text, number)
        scale = self._multipliers(token_ids)
        return self.mechanism.privatise_sample(hidden, token_ids, stream, scale)

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
        draws = max(map(len, self._views.values()), default=0)
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
