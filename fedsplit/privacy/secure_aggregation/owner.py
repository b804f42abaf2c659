"""An owner's side of one masked sum: Bonawitz et al. (CCS 2017) on the graph of SecAgg+.

Five messages, each answered once, in this order (the numbers are Bonawitz' rounds)::

    0 begin      fresh keys, signed                          -> advert
    1 share      roster, neighbours' adverts                 -> sealed shares of both its secrets
    2 accept     the neighbours' sealed shares
      mask       its numbers                                 -> numbers + own mask + pairwise masks
    3 confirm    who is in the sum                           -> signature of that
    4 reveal     the neighbours' signatures of the same      -> one share per neighbour: of the own
                                                                mask of one in the sum, of the mask
                                                                key of one that dropped out

Formal Guarantees:
    Let an owner have k neighbours of which c collude with the server, t = ``Roster.threshold`` and
    c < 2 t - k and c < t.  Whatever the server sends, it learns of the owner's numbers nothing
    beyond a sum, modulo 2^b, over owners that contains the owner's numbers and those of at least
    ``fewest - 1`` of its counted neighbours (t - c honest ones where nothing more is asked).  For
    both kinds of one owner's shares t neighbours each must have revealed, and an honest one reveals
    once, for one set of survivors that t of its own neighbours have signed.

    With an identity key that the neighbours know, the server cannot put keys of its own in the
    place of theirs.

What breaks it:
    neighbours that are the server's own (where keys are not known, all of them may be); sums of two
    rounds of which one differs by one owner; a sum so small, or of parts so known, that it tells.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from fedsplit.errors import PrivacyError
from fedsplit.privacy.secure_aggregation import shamir
from fedsplit.privacy.secure_aggregation.masks import (
    NDArray,
    add_mask,
    agree,
    commit,
    identity_public,
    is_signed,
    new_key,
    public_key,
    seal,
    sign,
    unseal,
)
from fedsplit.privacy.secure_aggregation.roster import Advert, Occasion, Roster

BEGUN, SHARED, ACCEPTED, MASKED, CONFIRMED, DONE = (
    "begun",
    "shared",
    "accepted",
    "masked",
    "confirmed",
    "done",
)
OWN, KEY = "mask", "key"  # kinds of shares: of an own mask's seed, of a mask key


@dataclass(frozen=True)
class Peer:
    """A neighbour, as an owner knows it.

    Attributes:
        name: public name.
        identity: its identity key.
        sealing: the secret key that shares between it and this owner are sealed with.
        masking: its key for masks.
        counted: whether its key is one that counts toward the fewest owners of a sum.
        shares: of its seed and its mask key, that it gave this owner; empty: it gave none.
    """

    name: str
    identity: bytes
    sealing: bytes
    masking: bytes
    counted: bool
    shares: bytes = b""


@dataclass(frozen=True)
class Shared:
    """What an owner answers to the roster.

    Attributes:
        sealed: neighbour's index -> sealed shares for it.
        commitment: to the seed of its own mask.
    """

    sealed: dict[int, bytes]
    commitment: bytes


class OwnerSide:
    """One owner's part in one masked sum; see the module.

    Args:
        occasion: what the sum belongs to.
        name: public name.
        identity: private half of its identity key.
        fewest: owners at least in the sum, itself included.

    Attributes:
        phase: what it has done last.
    """

    def __init__(self, occasion: Occasion, name: str, identity: bytes, fewest: int = 3) -> None:
        self.occasion = occasion
        self.name = name
        self.fewest = fewest
        self.phase = ""
        self._identity = identity
        self._sealing = self._masking = self._seed = b""
        self._at = -1
        self._roster: Roster | None = None
        self._peers: dict[int, Peer] = {}
        self._survivors: tuple[int, ...] = ()

    # ---- 0: keys ----------------------------------------------------------------------------

    def begin(self) -> Advert:
        """Return fresh keys, signed.

        Raises:
            PrivacyError: keys of this round have been given out already.
        """
        self._move("", BEGUN)
        self._sealing, self._masking, self._seed = new_key(), new_key(), new_key()
        keys = public_key(self._sealing), public_key(self._masking)
        advert = Advert(self.name, identity_public(self._identity), *keys)
        return advert.with_signature(self._identity, self.occasion)

    # ---- 1: shares --------------------------------------------------------------------------

    def share(
        self, roster: Roster, adverts: Sequence[Advert], counts: Callable[[Advert], bool]
    ) -> Shared:
        """Return sealed shares of the own mask's seed and of the mask key.

        Args:
            roster: as the server tells it.
            adverts: of the neighbours.
            counts: whether an advert's identity key is one that counts; raises PrivacyError for a
                name whose key is known to be another.

        Raises:
            PrivacyError: this owner is not in the roster, the adverts are not those of its
                neighbours, a signature is wrong, or too few of them count.
        """
        self._expect(BEGUN)
        if roster.occasion != self.occasion:
            raise PrivacyError("roster: must be of this round and these settings")
        keys = public_key(self._sealing), public_key(self._masking)
        own = Advert(self.name, identity_public(self._identity), *keys).digest(self.occasion)
        if own not in roster.digests:
            raise PrivacyError("roster: must hold this owner's own keys, and does not")
        self._at = roster.digests.index(own)
        places = {digest: at for at, digest in enumerate(roster.digests)}
        found: dict[int, Peer] = {}
        sealing: dict[int, bytes] = {}  # public halves
        for advert in adverts:
            advert.check(self.occasion)
            at = places.get(advert.digest(self.occasion))
            if at is None:
                raise PrivacyError(f"keys of {advert.name!r}: not those that the roster names")
            sealing[at] = advert.sealing
            kept = advert.name, advert.identity, b"", advert.masking
            found[at] = Peer(*kept, counted=counts(advert))
        if sorted(found) != roster.around(self._at):
            raise PrivacyError(
                f"adverts of {len(found)} peers: must be those of this owner's "
                f"{roster.degree} neighbours in the roster"
            )
        names = {peer.name for peer in found.values()} | {self.name}
        identities = {p.identity for p in found.values()} | {identity_public(self._identity)}
        if len(names) <= len(found) or len(identities) <= len(found):
            raise PrivacyError("roster: two owners of one name or one identity key")
        self._roster, self._peers = roster, found
        self._check_enough(list(found), "neighbours")
        strangers = sum(not peer.counted for peer in found.values())
        if strangers >= 2 * roster.threshold - roster.degree:
            raise PrivacyError(
                f"neighbours without a known key={strangers}: must be < "
                f"{2 * roster.threshold - roster.degree} of {roster.degree}, at threshold "
                f"{roster.threshold}: together they could take a mask off"
            )
        for at, public in sealing.items():  # once: both directions are sealed with the same key
            purpose = pair_purpose(roster, self._at, at, "seal")
            found[at] = replace(found[at], sealing=agree(self._sealing, public, purpose))
        self._sealing = b""
        points = {at: at + 1 for at in found}
        seeds = shamir.split(self._seed, roster.threshold, list(points.values()))
        keys_ = shamir.split(self._masking, roster.threshold, list(points.values()))
        sealed = {
            at: seal(found[at].sealing, seeds[x] + keys_[x], self._about(self._at, at))
            for at, x in points.items()
        }
        self.phase = SHARED
        about = roster.digest + self._at.to_bytes(4, "little")
        return Shared(sealed, commit(self._seed, about))

    # ---- 2: masked numbers ------------------------------------------------------------------

    def accept(self, sealed: Mapping[int, bytes]) -> None:
        """Take the neighbours' shares; masks are made with those whose shares have come.

        Args:
            sealed: neighbour's index -> its sealed shares for this owner.

        Raises:
            PrivacyError: one that is no neighbour's or cannot be opened, or too few.
        """
        self._move(SHARED, ACCEPTED)
        for at, text in sealed.items():
            if at not in self._peers:
                raise PrivacyError(f"sealed shares of owner {at}: not a neighbour")
            shares = unseal(self._peers[at].sealing, text, self._about(at, self._at))
            if len(shares) != 2 * shamir.SHARE_BYTES:
                raise PrivacyError(f"shares of {self._peers[at].name!r}: of another length")
            self._peers[at] = replace(self._peers[at], shares=shares)
        self._peers = {at: replace(peer, sealing=b"") for at, peer in self._peers.items()}
        self._check_enough(list(sealed), "neighbours with shares")

    def mask(self, vector: NDArray) -> NDArray:
        """Return the numbers under this owner's masks; its keys are forgotten.

        Args:
            vector: (d,), unsigned integers, see
                :class:`~fedsplit.privacy.secure_aggregation.quantisation.Quantiser`.
        """
        self._move(ACCEPTED, MASKED)
        found = vector.copy()
        add_mask(found, self._seed, 1)
        for at, peer in self._peers.items():
            if peer.shares:
                pair = agree(self._masking, peer.masking, pair_purpose(self._whole, self._at, at))
                add_mask(found, pair, 1 if self._at < at else -1)
        self._masking = self._seed = b""
        return found

    # ---- 3: who is in the sum ---------------------------------------------------------------

    def confirm(self, survivors: Sequence[int]) -> bytes:
        """Return the signature of the set of owners whose masked numbers are in the sum.

        Raises:
            PrivacyError: this owner is not among them, a neighbour is with whom no mask was made,
                too few are, or a set was confirmed before.
        """
        roster = self._whole
        self._expect(MASKED)
        told = tuple(sorted(set(survivors)))
        if len(told) != len(survivors) or not set(told) <= set(range(len(roster.digests))):
            raise PrivacyError("survivors: must be distinct owners of the roster")
        if self._at not in told:
            raise PrivacyError("survivors: must hold this owner, whose numbers were sent")
        near = [at for at in told if at in self._peers]
        odd = [self._peers[at].name for at in near if not self._peers[at].shares]
        if odd:
            raise PrivacyError(f"survivors: {odd[0]!r} is one, but no mask was made with it")
        self._check_enough(near, "survivors among the neighbours")
        self._survivors, self.phase = told, CONFIRMED
        return sign(self._identity, roster.confirmation(told))

    # ---- 4: shares in the clear -------------------------------------------------------------

    def reveal(self, signatures: Mapping[int, bytes]) -> dict[int, tuple[str, bytes]]:
        """Return one share per neighbour that takes off what masks are left in the sum.

        Args:
            signatures: neighbour's index -> its signature of the set of survivors.

        Raises:
            PrivacyError: fewer than the threshold of surviving neighbours have signed the set that
                this owner was told; nothing is revealed, now or later.
        """
        self._move(CONFIRMED, DONE)
        roster = self._whole
        text = roster.confirmation(self._survivors)
        good = [
            at
            for at, signature in signatures.items()
            if at in self._peers
            and at in self._survivors
            and is_signed(self._peers[at].identity, signature, text)
        ]
        self._check_enough(good, "neighbours that confirm the same survivors")
        half = shamir.SHARE_BYTES
        found = {
            at: (OWN, peer.shares[:half]) if at in self._survivors else (KEY, peer.shares[half:])
            for at, peer in self._peers.items()
            if peer.shares
        }
        self._peers = {}
        return found

    @property
    def owners(self) -> int:
        """Owners of the roster, all of whom the sum may be of."""
        return len(self._whole.digests)

    # ---- over processes ---------------------------------------------------------------------

    def to_json(self) -> bytes:
        """Return the state for the next message's process; it holds secrets: keep it private."""
        roster = self._whole if self._roster is not None else None
        told: dict[str, Any] = {
            "run": self.occasion.run,
            "round": self.occasion.round,
            "plan": self.occasion.plan.hex(),
            "name": self.name,
            "fewest": self.fewest,
            "phase": self.phase,
            "keys": [self._sealing.hex(), self._masking.hex(), self._seed.hex()],
            "at": self._at,
            "survivors": list(self._survivors),
            "peers": {
                str(at): {k: v.hex() if isinstance(v, bytes) else v for k, v in asdict(p).items()}
                for at, p in self._peers.items()
            },
        }
        if roster is not None:
            told["roster"] = [d.hex() for d in roster.digests]
            told["graph"] = [roster.neighbours, roster.share]
        return json.dumps(told).encode()

    @classmethod
    def from_json(cls, text: bytes, identity: bytes) -> Self:
        """Return the owner's side that :meth:`to_json` describes.

        Raises:
            PrivacyError: the text is damaged.
        """
        try:
            told = json.loads(text)
            occasion = Occasion(told["run"], told["round"], bytes.fromhex(told["plan"]))
            side = cls(occasion, told["name"], identity, told["fewest"])
            side.phase, side._at = told["phase"], told["at"]
            side._sealing, side._masking, side._seed = map(bytes.fromhex, told["keys"])
            side._survivors = tuple(told["survivors"])
            for at, row in told["peers"].items():
                keys = {
                    k: bytes.fromhex(row[k]) for k in ("identity", "sealing", "masking", "shares")
                }
                side._peers[int(at)] = Peer(name=row["name"], counted=row["counted"], **keys)
            if "roster" in told:
                digests = tuple(map(bytes.fromhex, told["roster"]))
                side._roster = Roster(occasion, digests, *told["graph"])
        except (ValueError, KeyError, TypeError) as error:
            raise PrivacyError(f"kept state of a masked sum: damaged: {error}") from None
        return side

    # ---- the parts --------------------------------------------------------------------------

    @property
    def _whole(self) -> Roster:
        if self._roster is None:
            raise PrivacyError("no roster has come yet")
        return self._roster

    def _expect(self, phase: str) -> None:
        if self.phase != phase:
            raise PrivacyError(
                f"round {self.occasion.round}: this owner's part is {self.phase or 'not begun'!r}: "
                f"must be {phase or 'not begun'!r}; each message is answered once"
            )

    def _move(self, phase: str, after: str) -> None:
        self._expect(phase)
        self.phase = after  # whatever becomes of it: a failed step is not tried again

    def _check_enough(self, near: Sequence[int], what: str) -> None:
        threshold = self._whole.threshold
        if len(near) < threshold:
            raise PrivacyError(f"{what}={len(near)}: must be >= {threshold}, the threshold")
        counted = sum(self._peers[at].counted for at in near)
        if counted + 1 < self.fewest:
            raise PrivacyError(
                f"{what} with known keys={counted}: must be >= {self.fewest - 1}, so that the sum "
                f"is of {self.fewest} owners"
            )

    def _about(self, sender: int, receiver: int) -> bytes:
        return self._whole.digest + sender.to_bytes(4, "little") + receiver.to_bytes(4, "little")


def pair_purpose(roster: Roster, one: int, other: int, use: str = "pair") -> bytes:
    """Return what a secret of two owners is bound to.

    Args:
        roster: of their sum.
        one: an owner's index.
        other: the other's.
        use: ``pair``: their common mask; ``seal``: the shares that they send each other, whose
            direction is in what each is sealed about.
    """
    low, high = sorted((one, other))
    ends = low.to_bytes(4, "little") + high.to_bytes(4, "little")
    return roster.occasion.label(use) + roster.digest + ends
