"""Who takes part in one masked sum, which every owner checks for itself: adverts, roster, graph.

An advert is an owner's fresh public keys, signed by its lasting identity key.  The roster is the
list of all adverts' digests, in order; its digest stands in whatever is signed or sealed later, so
that owners who were told different rosters have nothing to do with each other.  Who shares masks
with whom follows from the roster's digest: everyone with everyone, or on a ring in random order
each with the k / 2 nearest on either side (the Harary graph of SecAgg+, Bell et al.,
arXiv/ePrint 2020/704, section 4).

What breaks the random order: a server that registers owners of its own can try keys for them until
an honest owner's neighbours are mostly its own.  Owners that know each other's keys count only
those (see :mod:`fedsplit.privacy.secure_aggregation.owner`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from struct import Struct
from typing import Self

from fedsplit.errors import PrivacyError
from fedsplit.privacy.secure_aggregation.masks import KEY_BYTES, SIGNATURE_BYTES, is_signed, sign

DIGEST_BYTES = 32
MOST_OWNERS = 100_000
_HEAD = Struct("<QQ")


@dataclass(frozen=True)
class Occasion:
    """What one masked sum belongs to.

    Attributes:
        run: Flower's run id.
        round: server round.
        plan: digest of the settings that all owners must have alike.
    """

    run: int
    round: int
    plan: bytes

    def label(self, purpose: str) -> bytes:
        """Return what keys, seals and signatures of that purpose are bound to."""
        text = f"fedsplit.secagg.1.{purpose}".encode()
        return text + b"\0" + _HEAD.pack(self.run, self.round) + self.plan


@dataclass(frozen=True)
class Advert:
    """An owner's keys for one masked sum.

    Attributes:
        name: public name.
        identity: its lasting Ed25519 public key.
        sealing: X25519 public key that shares for it are sealed with.
        masking: X25519 public key that pairwise masks come from.
        signature: by ``identity``, over all of it and the occasion.
    """

    name: str
    identity: bytes
    sealing: bytes
    masking: bytes
    signature: bytes = b""

    def signed(self, occasion: Occasion) -> bytes:
        """Return what is signed."""
        name = self.name.encode()
        whole = len(name).to_bytes(2, "little") + name + self.identity + self.sealing + self.masking
        return occasion.label("advert") + whole

    def digest(self, occasion: Occasion) -> bytes:
        """Return the digest by which the roster knows it."""
        return hashlib.sha256(self.signed(occasion)).digest()

    def with_signature(self, identity: bytes, occasion: Occasion) -> Advert:
        """Return it signed by the private half of its identity."""
        text = self.signed(occasion)
        return Advert(self.name, self.identity, self.sealing, self.masking, sign(identity, text))

    def to_bytes(self) -> bytes:
        """Return keys, signature and name, one behind the other."""
        keys = self.identity + self.sealing + self.masking
        return keys + self.signature + self.name.encode()

    @classmethod
    def from_bytes(cls, text: bytes) -> Self:
        """Return the advert of :meth:`to_bytes`, unchecked.

        Raises:
            PrivacyError: too short, too long, or a name that is no text.
        """
        ends = KEY_BYTES, 2 * KEY_BYTES, 3 * KEY_BYTES, 3 * KEY_BYTES + SIGNATURE_BYTES
        try:
            if not ends[-1] < len(text) <= ends[-1] + 256:
                raise ValueError(f"{len(text)} bytes")
            name = text[ends[3] :].decode()
        except ValueError as error:
            raise PrivacyError(f"a peer's keys: malformed: {error}") from None
        keys = text[: ends[0]], text[ends[0] : ends[1]], text[ends[1] : ends[2]]
        return cls(name, *keys, text[ends[2] : ends[3]])

    def check(self, occasion: Occasion) -> None:
        """Check form and signature.

        Raises:
            PrivacyError: names what is wrong.
        """
        if not 0 < len(self.name) <= 64 or not self.name.isprintable():
            raise PrivacyError("a peer's name: must be 1 to 64 printable characters")
        keys = (self.identity, self.sealing, self.masking)
        if any(len(key) != KEY_BYTES for key in keys) or len(self.signature) != SIGNATURE_BYTES:
            raise PrivacyError(f"keys of {self.name!r}: must be {KEY_BYTES} bytes each, and signed")
        if not is_signed(self.identity, self.signature, self.signed(occasion)):
            raise PrivacyError(
                f"keys of {self.name!r}: their signature is not of this round and these settings"
            )


@dataclass(frozen=True)
class Roster:
    """All owners of one masked sum.

    Attributes:
        occasion: what it belongs to.
        digests: of their adverts, sorted; an owner's place is its index.
        neighbours: with how many each shares masks, an even number; 0 = with all.
        share: of an owner's neighbours whose shares open one of its secrets.

    Raises:
        PrivacyError: too few or too many owners, or digests that are not distinct and sorted.
    """

    occasion: Occasion
    digests: tuple[bytes, ...]
    neighbours: int
    share: float

    def __post_init__(self) -> None:
        if not 2 <= len(self.digests) <= MOST_OWNERS:
            raise PrivacyError(f"owners={len(self.digests)}: must be in [2, {MOST_OWNERS}]")
        pairs = zip(self.digests, self.digests[1:], strict=False)
        if any(len(d) != DIGEST_BYTES for d in self.digests) or any(a >= b for a, b in pairs):
            raise PrivacyError("roster: digests must be distinct, sorted, of 32 bytes")

    @classmethod
    def of(
        cls, occasion: Occasion, adverts: Sequence[Advert], neighbours: int, share: float
    ) -> Roster:
        """Return the roster of these adverts."""
        digests = tuple(sorted(advert.digest(occasion) for advert in adverts))
        return cls(occasion, digests, neighbours, share)

    @cached_property
    def digest(self) -> bytes:
        """Names the roster, graph and threshold included."""
        told = f"{self.neighbours} {self.share!r}".encode()
        whole = hashlib.sha256(self.occasion.label("roster") + told)
        for digest in self.digests:
            whole.update(digest)
        return whole.digest()

    @property
    def degree(self) -> int:
        """Neighbours of each owner."""
        everyone = len(self.digests) - 1
        return everyone if not self.neighbours else min(self.neighbours, everyone)

    @property
    def threshold(self) -> int:
        """Neighbours whose shares open one secret: their share, and always more than half.

        More than half, since no neighbour reveals two kinds of one owner's shares: for a server
        without owners of its own, both kinds together would take more neighbours than there are.
        """
        return max(math.ceil(self.share * self.degree), self.degree // 2 + 1)

    @cached_property
    def _ring(self) -> tuple[list[int], list[int]]:
        """Return (indices in the order of the ring, each index's place in it)."""
        seed = self.digest
        owners = range(len(self.digests))
        keys = [hashlib.sha256(seed + at.to_bytes(4, "little")).digest() for at in owners]
        order = sorted(owners, key=keys.__getitem__)
        places = [0] * len(order)
        for place, at in enumerate(order):
            places[at] = place
        return order, places

    def around(self, at: int) -> list[int]:
        """Return the indices of an owner's neighbours, in order."""
        count = len(self.digests)
        if self.degree == count - 1:
            return [other for other in range(count) if other != at]
        order, places = self._ring
        half = self.neighbours // 2
        found = {order[(places[at] + by) % count] for by in range(-half, half + 1)}
        return sorted(found - {at})

    def confirmation(self, survivors: Sequence[int]) -> bytes:
        """Return what an owner signs to say which owners it was told to be in the sum."""
        bitmap = bytearray(-(-len(self.digests) // 8))
        for at in survivors:
            bitmap[at // 8] |= 1 << at % 8
        return self.occasion.label("survivors") + self.digest + bytes(bitmap)
