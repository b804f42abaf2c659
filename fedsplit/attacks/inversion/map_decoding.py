"""Maximum a posteriori inversion: what a server knowing the noise's law and the language reads.

Same search as the nearest neighbour with the log prior of public text added, so it never gains from
ignoring how common a token is.  At k = 0 this is the attack to report empirical privacy against.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedsplit.attacks.base import TokenAttack, View
from fedsplit.attacks.inversion.nearest import has_candidates
from fedsplit.attacks.scoring import Inversion
from fedsplit.errors import check
from fedsplit.privacy.denoising.candidate_search import search
from fedsplit.privacy.denoising.candidates import Candidates
from fedsplit.privacy.denoising.position_candidates import in_coordinates
from fedsplit.privacy.denoising.posterior import Touched, likelihood_of, whiten
from fedsplit.privacy.mechanisms.base import Mechanism


@dataclass(frozen=True)
class MapInversion(TokenAttack):
    """The attack: each received vector is read as its most probable candidate.

    Args:
        top_k: guesses ranked per token.
    """

    name: ClassVar[str] = "map"
    knows: ClassVar[str] = (
        "white box: the initial bottom (k = 0), the mechanism's law, a unigram prior from public "
        "text"
    )
    result_key: ClassVar[str] = "map_inversion"
    words: ClassVar[str] = "an attacker who also knows the noise and word frequencies"
    top_k: int = 10

    def __post_init__(self) -> None:
        check(self.top_k >= 1, "top_k", self.top_k, ">= 1 (guesses)")

    def applies(self, view: View) -> bool:
        """Return whether there are candidates and noise of a known law."""
        return super().applies(view) and has_candidates(view) and view.public.noisy

    def read(self, view: View) -> Inversion:
        """Return the guesses."""
        of = view.public
        candidates = of.candidates(view.rows)
        return self.invert(view.rows, candidates, of.known_mechanism, of.log_prior(), of.touched)

    def invert(
        self,
        representations: Sequence[Tensor],
        candidates: Candidates,
        mechanism: Mechanism,
        log_prior: Tensor | None = None,
        touched: Touched | None = None,
    ) -> Inversion:
        """Guess the tokens behind ``representations``.

        Args:
            representations: what was received, per sample ``(T_i, d)``.
            candidates: public vectors of every token.
            mechanism: its public law.
            log_prior: ``(V,)``; None for a uniform one (then it is the nearest neighbour).
            touched: reduced noise on some tokens (CTI), as announced; None if there is none.

        Raises:
            PrivacyError: if the mechanism's law is not known.
        """
        start = time.perf_counter()
        whitener = mechanism.whitener()
        if whitener is not None:
            candidates = in_coordinates(candidates, whitener)
        ids, _ = search(
            whiten(representations, whitener),
            candidates,
            self.top_k,
            log_likelihood=likelihood_of(mechanism, candidates.dim, touched),
            log_prior=log_prior,
        )
        seconds = time.perf_counter() - start
        return Inversion(ids=[x[:, 0] for x in ids], top=ids, seconds=seconds)
