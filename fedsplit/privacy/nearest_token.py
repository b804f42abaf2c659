"""d_chi noise, then the nearest vocabulary token: the text-to-text variant.

Feyisetan et al., WSDM 2020, arXiv 1910.08902, algorithm 1; Qu et al., CIKM 2021, arXiv 2108.01624.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsplit.errors import PrivacyError, check
from fedsplit.privacy.candidates import Candidates
from fedsplit.privacy.dchi import DChi
from fedsplit.privacy.mechanism import Mechanism
from fedsplit.privacy.scan import search
from fedsplit.privacy.secret import SecretStream


@dataclass(frozen=True)
class NearestToken(Mechanism):
    """Add d_chi noise, then send the clean vector of the token that is nearest in L2.

    Guarantee:
        That of :class:`fedsplit.privacy.dchi.DChi` at the same eta: rounding is post-processing.
        What leaves is a text (:meth:`tokens`): the server learns nothing more from the vectors.
    What breaks it:
        What breaks ``dchi``.  Tokens that stay themselves look like any other token, but at a large
        eta most do stay: count them.  A token far from all others keeps itself at noise that moves
        every other one (Xu et al., 2020, arXiv 2010.11947).
    Source:
        arXiv 1910.08902 algorithm 1, with L2 and candidates built through the bottom.

    Args:
        eta: as in ``dchi`` (1/length units of the representation).
        candidates: public vectors of every token, of this bottom at k = 0; they belong to the
            representation's identity and are not described again.
    """

    name: ClassVar[str] = "nearest_token"
    eta: float
    candidates: Candidates = field(repr=False, compare=False)

    def __post_init__(self) -> None:
        ok = isinstance(self.eta, int | float) and self.eta > 0 and math.isfinite(self.eta)
        check(ok, "eta", self.eta, "> 0 (1/length units of the representation)")
        check(
            isinstance(self.candidates, Candidates),
            "candidates",
            type(self.candidates).__name__,
            "Candidates (see candidates_through)",
        )
        object.__setattr__(self, "eta", float(self.eta))

    def describe(self) -> dict[str, Any]:
        """See :meth:`Mechanism.describe`."""
        return {"mechanism": self.name, "eta": self.eta, "vocab_size": self.candidates.vocab_size}

    def tokens(self, hidden: Tensor, stream: SecretStream, scale: Tensor | None = None) -> Tensor:
        """Return the token ids that stand for ``hidden``, ``(T, d) -> (T,)``."""
        noisy = DChi(self.eta).privatise(hidden.detach(), stream, scale)
        if hidden.shape[1] != self.candidates.dim:
            raise PrivacyError(
                f"hidden.shape={tuple(hidden.shape)}: must be (T, {self.candidates.dim})"
            )
        if not len(noisy):
            return torch.zeros(0, dtype=torch.int64)
        return search([noisy], self.candidates)[0][0][:, 0]

    def privatise(
        self, hidden: Tensor, stream: SecretStream, scale: Tensor | None = None
    ) -> Tensor:
        """See :meth:`Mechanism.privatise`; the backward pass treats the replacement as identity."""
        ids = self.tokens(hidden, stream, scale)
        clean = torch.empty(hidden.shape, dtype=torch.float32, device=self.candidates.device)
        for first, block in self.candidates.blocks():  # (P, v, d)
            here = ((ids >= first) & (ids < first + block.shape[1])).nonzero().squeeze(1)
            position = here if self.candidates.positions > 1 else torch.zeros_like(here)
            clean[here] = block[position, ids[here] - first]
        out: Tensor = _Replace.apply(hidden, clean.to(hidden))  # type: ignore[no-untyped-call]
        return out

    def guarantee(self, views: int = 1) -> str:
        """See :meth:`Mechanism.guarantee`."""
        return f"{DChi(self.eta).guarantee(views)}; what is sent are other tokens' clean vectors"

    def per_token_epsilon(self, distance: float, views: int = 1) -> float:
        """See :meth:`Mechanism.per_token_epsilon`; eta * distance * views."""
        return DChi(self.eta).per_token_epsilon(distance, views)


class _Replace(torch.autograd.Function):
    """``clean`` forward, exactly; the gradient to ``hidden`` backward.

    ``hidden + (clean - hidden).detach()`` would do the same with rounding errors that depend on the
    private ``hidden``, and would send them.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, clean: Tensor) -> Tensor:
        return clean

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
