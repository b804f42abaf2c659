"""The server's arithmetic of one masked sum: roster, sum, and the masks that are left in it.

What the server is trusted with: nothing but the result being right.  That it learns no more than
the sum is the owners' doing (:mod:`fedsplit.privacy.secure_aggregation.owner`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedsplit.errors import PrivacyError
from fedsplit.privacy.secure_aggregation import shamir
from fedsplit.privacy.secure_aggregation.masks import (
    KEY_BYTES,
    NDArray,
    add_mask,
    agree,
    commit,
    is_signed,
    public_key,
)
from fedsplit.privacy.secure_aggregation.owner import KEY, OWN, pair_purpose
from fedsplit.privacy.secure_aggregation.roster import Advert, Occasion, Roster


@dataclass
class MaskedSum:
    """One masked sum, from the owners' keys to their numbers' sum.

    Attributes:
        occasion: what it belongs to.
        adverts: the owners' keys, in the order of the roster.
        roster: who takes part.
        sealed: sender -> receiver -> sealed shares.
        survivors: who is in the sum.
    """

    occasion: Occasion
    adverts: list[Advert]
    roster: Roster
    sealed: dict[int, dict[int, bytes]] = field(default_factory=dict)
    survivors: set[int] = field(default_factory=set)
    _commitments: dict[int, bytes] = field(default_factory=dict)
    _total: NDArray | None = None
    _signatures: dict[int, bytes] = field(default_factory=dict)
    _shares: dict[int, dict[str, dict[int, bytes]]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, occasion: Occasion, adverts: Sequence[Advert], neighbours: int, share: float
    ) -> MaskedSum:
        """Begin a sum over these owners.

        Raises:
            PrivacyError: too few of them, or two with the same keys.
        """
        roster = Roster.of(occasion, adverts, neighbours, share)
        places = {advert.digest(occasion): advert for advert in adverts}
        return cls(occasion, [places[d] for d in roster.digests], roster)

    def place(self, name: str) -> int:
        """Return the index of an owner."""
        return next(at for at, advert in enumerate(self.adverts) if advert.name == name)

    # ---- 1, 2: shares and numbers -----------------------------------------------------------

    def take_shares(self, at: int, sealed: Mapping[int, bytes], commitment: bytes) -> None:
        """Take one owner's sealed shares, to be handed on.

        Raises:
            PrivacyError: they are not for its neighbours, or too large.
        """
        if sorted(sealed) != self.roster.around(at) or len(commitment) != KEY_BYTES:
            raise PrivacyError(f"shares of {self.adverts[at].name!r}: must be for its neighbours")
        if any(len(text) > 256 for text in sealed.values()):
            raise PrivacyError(f"shares of {self.adverts[at].name!r}: must be <= 256 bytes each")
        self.sealed[at] = dict(sealed)
        self._commitments[at] = commitment

    def shares_for(self, at: int) -> dict[int, bytes]:
        """Return the sealed shares that an owner's neighbours have for it."""
        return {
            near: self.sealed[near][at] for near in self.roster.around(at) if near in self.sealed
        }

    def take_numbers(self, at: int, vector: NDArray, like: np.dtype[Any], size: int) -> None:
        """Add one owner's masked numbers.

        Raises:
            PrivacyError: another type or number of them, or none were due.
        """
        if vector.dtype != like or vector.shape != (size,):
            raise PrivacyError(
                f"masked numbers: {vector.dtype} {vector.shape}: must be {like} ({size},)"
            )
        if at not in self.sealed or at in self.survivors:
            raise PrivacyError("masked numbers: none are due from this owner")
        if self._total is None:
            self._total = np.zeros(size, dtype=like)
        self._total += vector
        self.survivors.add(at)

    def check_enough(self, owners: int) -> None:
        """Check that the sum can be taken.

        Raises:
            PrivacyError: too few owners, or some owner's neighbours cannot open what they must.
        """
        if len(self.survivors) < owners:
            raise PrivacyError(
                f"owners in the masked sum={len(self.survivors)}: must be >= {owners}"
            )
        threshold = self.roster.threshold
        for at in self.sealed:
            near = self.survivors.intersection(self.roster.around(at))
            if len(near) < threshold:
                raise PrivacyError(
                    f"masked sum: {len(near)} of {self.roster.degree} neighbours of "
                    f"{self.adverts[at].name!r} answered: must be >= {threshold} "
                    "(secure.threshold); nothing can be said of the sum"
                )

    # ---- 3, 4: confirmations and shares in the clear ----------------------------------------

    def take_confirmation(self, at: int, signature: bytes) -> None:
        """Take an owner's signature of the set of survivors.

        Raises:
            PrivacyError: it is not of this set.
        """
        text = self.roster.confirmation(sorted(self.survivors))
        if not is_signed(self.adverts[at].identity, signature, text):
            raise PrivacyError(f"confirmation of {self.adverts[at].name!r}: not of these survivors")
        self._signatures[at] = signature

    @property
    def confirmed(self) -> set[int]:
        """Who has confirmed the survivors."""
        return set(self._signatures)

    def signatures_for(self, at: int) -> dict[int, bytes]:
        """Return the neighbours' confirmations."""
        near = self.roster.around(at)
        return {other: self._signatures[other] for other in near if other in self._signatures}

    def take_reveals(self, at: int, reveals: Mapping[int, tuple[str, bytes]]) -> None:
        """Take the shares that an owner reveals.

        Raises:
            PrivacyError: a share of the wrong kind or length, or of one that is no neighbour.
        """
        near = set(self.roster.around(at))
        for other, (kind, share) in reveals.items():
            due = OWN if other in self.survivors else KEY
            if other not in near or kind != due or len(share) != shamir.SHARE_BYTES:
                raise PrivacyError(f"shares that {self.adverts[at].name!r} reveals: not those due")
        for other, (kind, share) in reveals.items():
            self._shares.setdefault(other, {}).setdefault(kind, {})[at + 1] = share

    def total(self) -> NDArray:
        """Return the survivors' sum, with every mask taken off.

        Raises:
            PrivacyError: too few shares were revealed, or false ones; names whose they are of.
        """
        if self._total is None:
            raise PrivacyError("masked sum: nobody's numbers are in it")
        found = self._total.copy()
        for at in sorted(self.survivors):
            seed = self._open(at, OWN)
            about = self.roster.digest + at.to_bytes(4, "little")
            if commit(seed, about) != self._commitments[at]:
                raise PrivacyError(
                    f"shares of {self.adverts[at].name!r}'s mask: do not fit its commitment"
                )
            add_mask(found, seed, -1)
        for at in sorted(self.sealed.keys() - self.survivors):
            near = self.survivors.intersection(self.roster.around(at))
            private = self._open(at, KEY)
            if public_key(private) != self.adverts[at].masking:
                raise PrivacyError(
                    f"shares of {self.adverts[at].name!r}'s mask key: do not fit its public key"
                )
            for other in near:  # their half of the pair's mask is still in the sum
                purpose = pair_purpose(self.roster, at, other)
                pair = agree(private, self.adverts[other].masking, purpose)
                add_mask(found, pair, -1 if other < at else 1)
        return found

    def _open(self, at: int, kind: str) -> bytes:
        shares = self._shares.get(at, {}).get(kind, {})
        threshold = self.roster.threshold
        if len(shares) < threshold:
            raise PrivacyError(
                f"masked sum: {len(shares)} shares of {self.adverts[at].name!r}'s {kind}: must be "
                f">= {threshold} (secure.threshold); nothing can be said of the sum"
            )
        return shamir.combine(shares, threshold)
