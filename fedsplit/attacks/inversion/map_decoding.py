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

from fedsplit.attacks.base import View
from fedsplit.attacks.inversion.nearest import CandidateAttack
from fedsplit.attacks.scoring import Inversion
from fedsplit.privacy.denoising.candidates import Candidates
from fedsplit.privacy.denoising.posterior import Touched, posterior_search
from fedsplit.privacy.mechanisms.base import Mechanism


@dataclass(frozen=True)
class MapInversion(CandidateAttack):
    """The attack: each received vector is read as its most probable candidate."""

    name: ClassVar[str] = "map"
    knows: ClassVar[str] = (
        "white box: the initial bottom (k = 0), the mechanism's law, a unigram prior from public "
        "text"
    )
    result_key: ClassVar[str] = "map_inversion"
    words: ClassVar[str] = "an attacker who also knows the noise and word frequencies"

    def applies(self, view: View) -> bool:
        """Return whether there are candidates and noise of a known law."""
        return super().applies(view) and view.public.noisy

    def read(self, view: View) -> Inversion:
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
        ids, _ = posterior_search(
            representations, candidates, mechanism, self.top_k, log_prior, touched
        )
        return Inversion(ids, time.perf_counter() - start)
