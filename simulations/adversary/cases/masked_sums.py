"""Case 11: a server that lies about a masked sum, to an owner whose numbers it wants.

The victim is the owner's real ClientApp, the honest others are the owner's side of the protocol as
it stands, and the server has owners of its own.  What the server takes is checked against what
would undo a sum: the seed of the victim's own mask (its commitment tells) together with its mask
key (its public half tells), a second vector under the same masks, or weights without masks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial

from fedsplit.errors import PrivacyError
from fedsplit.privacy.secure_aggregation import shamir
from fedsplit.privacy.secure_aggregation.masks import identity_public, new_key, public_key
from fedsplit.privacy.secure_aggregation.numbers import occasion_of
from fedsplit.privacy.secure_aggregation.owner import KEY, OWN, OwnerSide
from fedsplit.privacy.secure_aggregation.roster import Advert, Roster
from fedsplit.wire import secure_sum as wire
from simulations.adversary.cases.masked_cohort import VICTIM, Cohort, Federation
from simulations.adversary.context import Field, share_row
from simulations.adversary.reading import Row

CASE = 11


def play(field: Field) -> list[Row]:
    """Return what each lie about a masked sum brings; and that an honest one goes through."""
    lies = Lies(field)
    return [
        lies.honest_and_again(),
        lies.replayed,
        lies.cohorts(),
        lies.swapped_keys(),
        lies.other_neighbours(),
        lies.other_settings(),
        lies.all_but_one(),
        lies.mask_and_key(),
        lies.without_masks(),
    ]


class Lies(Federation):
    """What is tried on a federation.

    Attributes:
        replayed: the row of messages played again, set by :meth:`honest_and_again`.
    """

    replayed: Row

    def row(self, variant: str, outcomes: Sequence[bool], unit: str = "attempts") -> Row:
        """Return a row: none of the attempts may succeed."""
        return share_row(CASE, variant, sum(outcomes) / len(outcomes), 0.0, len(outcomes), unit)

    # ---- an honest sum, and its messages again -------------------------------------------------

    def honest_and_again(self) -> Row:
        """Play an honest sum to its end, then every message of it again."""
        cohort = self.cohort()
        went = [cohort.to_the_numbers()]
        everyone = list(cohort.names)
        signatures = {cohort.at(VICTIM): cohort.confirm(everyone)}
        for name, side in cohort.sides.items():
            signatures[cohort.at(name)] = side.confirm(range(len(everyone)))
        went.append(bool(signatures[cohort.at(VICTIM)]))
        mine = {at: text for at, text in signatures.items() if at != cohort.at(VICTIM)}
        went.append(len(cohort.reveal(mine)) == len(everyone) - 1)
        again = [
            not cohort.ask(wire.KEYS, {}).has_error(),
            cohort.share(),
            cohort.train().masked is not None,
            bool(cohort.confirm(everyone[1:])),
            bool(cohort.reveal(mine)),
        ]
        self.replayed = self.row("messages played again", again, "messages")
        return self.row("honest sums refused", [not good for good in went], "messages")

    # ---- before numbers are sent ---------------------------------------------------------------

    def cohorts(self) -> Row:
        """Name rosters of one owner, of the server's own, and of too many of its own."""
        found = []
        for friends, sybils in ((0, 1), (0, 9), (1, 8), (2, 7), (5, 4)):
            cohort = self.cohort(friends, sybils)
            found.append(cohort.begun and cohort.share())
        return self.row("cohort of its own", found)

    def swapped_keys(self) -> Row:
        """Put other keys in the place of an honest owner's."""
        found = []
        for swap in (_another_identity, _another_key, _an_earlier_advert):
            cohort = self.cohort()
            friend = cohort.adverts["friend-0"]
            swapped = swap(cohort, friend)
            told = [swapped if a.name == friend.name else a for a in cohort.around(VICTIM)]
            cohort.adverts[friend.name] = swapped  # in the roster too, or only on its way
            found.append(cohort.share(adverts=told))
            cohort = self.cohort()
            swapped = swap(cohort, cohort.adverts["friend-0"])
            others = [a for a in cohort.adverts.values() if a.name != "friend-0"]
            secure = cohort.config.secure
            cohort.roster = Roster.of(
                cohort.occasion, [*others, swapped], secure.neighbours, secure.threshold
            )
            told = [a for a in [*others, swapped] if a.name != VICTIM]
            found.append(cohort.share(adverts=told))
        return self.row("keys changed on their way", found)

    def other_neighbours(self) -> Row:
        """Name neighbours that the roster does not give."""
        flat = {**self.flat, "secure.neighbours": 4}
        found = []
        for choose in (
            lambda right, others: others[:4],
            lambda right, others: [*right[:3], others[0]],
            lambda right, others: right[:3],
            lambda right, others: [*right, *others],
        ):
            cohort = self.cohort(9, 0, flat)
            right = cohort.around(VICTIM)
            taken = {VICTIM, *(a.name for a in right)}
            others = [a for n, a in cohort.adverts.items() if n not in taken]
            found.append(cohort.share(adverts=choose(right, others)))
        return self.row("other neighbours' keys", found)

    def other_settings(self) -> Row:
        """Change the sum's settings between two messages of a round."""
        found = []
        for key, value in (
            ("secure.threshold", 0.5),
            ("secure.neighbours", 2),
            ("secure.bound", 1e6),
            ("secure.min-owners", 2),
        ):
            found.append(self.cohort().share(flat={**self.flat, key: value}))
        return self.row("settings changed between messages", found)

    # ---- when numbers are sent -----------------------------------------------------------------

    def all_but_one(self) -> Row:
        """Say that all others dropped out, and ask everybody to open their masks."""
        found = []
        cohort = self.cohort()
        ready = cohort.to_the_numbers()
        found.append(ready and bool(cohort.confirm([VICTIM])))
        found.append(ready and bool(cohort.confirm([VICTIM, "friend-0"])))
        for name in cohort.friends:
            alone = [cohort.at(VICTIM), cohort.at(name)]
            found.append(_answers(partial(cohort.sides[name].confirm, alone)))
        found.append(bool(cohort.reveal({})))
        return self.row("all but one dropped", found)

    def mask_and_key(self) -> Row:
        """Tell some owners that the victim is in the sum, and others that it dropped out."""
        most = 5
        splits = (2, 3) if self.field.quick else range(most + 1)
        found = []
        for inside in splits:
            cohort = self.cohort(most, 1)
            if not cohort.to_the_numbers():
                raise AssertionError("an honest sum does not reach its numbers")
            found.append(self._split(cohort, inside))
        return self.row("mask and mask key of one owner", found, "sums")

    def _split(self, cohort: Cohort, inside: int) -> bool:
        """Return whether a split of honest owners gave both of the victim's secrets."""
        victim, sybil = cohort.at(VICTIM), cohort.sides["sybil-0"]
        every = set(range(len(cohort.names)))
        told = {
            name: every if i < inside else every - {victim} for i, name in enumerate(cohort.friends)
        }
        signed: dict[bool, dict[int, bytes]] = {True: {}, False: {}}
        for name, survivors in told.items():
            signature = cohort.sides[name].confirm(sorted(survivors))
            signed[victim in survivors][cohort.at(name)] = signature
        if signature := cohort.confirm(cohort.names):
            signed[True][victim] = signature
        # The server's own owner signs both, and gives both of its shares of the victim's.
        state = OwnerSide.from_json(sybil.to_json(), new_key())
        for inside_it, survivors in ((True, every), (False, every - {victim})):
            signed[inside_it][cohort.at("sybil-0")] = _signature(sybil, survivors)
        own = state._peers[victim].shares
        half, point = shamir.SHARE_BYTES, cohort.at("sybil-0") + 1
        shares = {OWN: {point: own[:half]}, KEY: {point: own[half:]}}
        for name, survivors in told.items():
            side, at = cohort.sides[name], cohort.at(name)
            mine = {n: s for n, s in signed[victim in survivors].items() if n != at}
            try:
                kind, share = side.reveal(mine)[victim]
            except PrivacyError:
                continue
            shares[kind][at + 1] = share
        return cohort.is_undone(shares[OWN], shares[KEY])

    def without_masks(self) -> Row:
        """Ask for weights without masks, in a run of masked sums and in another."""
        found = []
        plain = {**self.flat, "secure.aggregation": False}
        cohort = self.cohort()
        for taken in (
            cohort.train(plain, masked=False),
            cohort.train(masked=False),
            self.cohort().train(),  # numbers before there are masks
        ):
            found.append(bool(taken.weights) or taken.masked is not None)
        return self.row("weights without masks", found)


def _answers(act: Callable[[], object]) -> bool:
    """Return whether an honest owner does what it is asked."""
    try:
        act()
    except PrivacyError:
        return False
    return True


def _signature(side: OwnerSide, survivors: Collection[int]) -> bytes:
    """Return a confirmation by an owner of the server's own, which signs whatever it likes."""
    copy = OwnerSide.from_json(side.to_json(), side._identity)
    return copy.confirm(sorted(survivors))


def _another_identity(cohort: Cohort, friend: Advert) -> Advert:
    identity = new_key()
    made = Advert(friend.name, identity_public(identity), *(public_key(new_key()),) * 2)
    return made.with_signature(identity, cohort.occasion)


def _another_key(cohort: Cohort, friend: Advert) -> Advert:
    key = public_key(new_key())
    return Advert(friend.name, friend.identity, key, friend.masking, friend.signature)


def _an_earlier_advert(cohort: Cohort, friend: Advert) -> Advert:
    identity = cohort.federation.identities[friend.name]
    earlier = occasion_of(cohort.config, cohort.run, cohort.number + 1)
    made: Advert = OwnerSide(earlier, friend.name, identity).begin()
    return made


__all__ = ["play"]
