"""Masked sums: exact whoever drops out, as far as the threshold allows; and servers that lie."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.errors import PrivacyError
from fedsplit.privacy.secure_aggregation import masks
from fedsplit.privacy.secure_aggregation.owner import KEY, OWN, OwnerSide
from fedsplit.privacy.secure_aggregation.roster import Advert, Occasion, Roster
from strategies.secure_aggregation.masked_sum import MaskedSum
from tests.privacy.secure_aggregation.parties import OCCASION, Round, everyone, some_vectors


def played(round_: Round, silent: set[int], mute: set[int]) -> np.ndarray:
    """Play a round whose ``silent`` owners send no numbers, whose ``mute`` ones reveal nothing."""
    round_.exchange_shares()
    round_.send_numbers(lost=silent)
    round_.server.check_enough(2)
    round_.confirm()
    round_.reveal(lost=mute)
    return round_.server.total()


@settings(max_examples=25)
@given(st.integers(4, 9), st.sampled_from([32, 64]), st.integers(0, 2**16), st.data())
def test_the_sum_is_exact_with_every_number_of_dropouts_below_the_threshold(
    owners: int, bits: int, seed: int, data: st.DataObject
) -> None:
    round_ = Round(some_vectors(owners, bits=bits, seed=seed))
    spare = round_.roster.degree - round_.roster.threshold
    order = data.draw(st.permutations(range(owners)))
    lost = data.draw(st.integers(0, spare))
    silent = set(order[: data.draw(st.integers(0, lost))])
    mute = set(order[len(silent) : lost])
    found = played(round_, silent, mute)
    assert np.array_equal(found, round_.sum_of(set(range(owners)) - silent))


def test_exactly_t_dropouts_are_recovered_and_one_more_is_not() -> None:
    spare = Round(some_vectors(10)).roster
    most = spare.degree - spare.threshold
    assert most == 3
    for lost in range(most + 1):
        round_ = Round(some_vectors(10))
        assert np.array_equal(
            played(round_, set(range(lost)), set()), round_.sum_of(range(lost, 10))
        )
    with pytest.raises(PrivacyError, match="must be >= 6"):
        played(Round(some_vectors(10)), set(range(most + 1)), set())
    with pytest.raises(PrivacyError, match="shares of 'owner-"):
        played(Round(some_vectors(10)), set(), set(range(most + 1)))


def test_an_owner_lost_before_its_shares_costs_nothing() -> None:
    round_ = Round(some_vectors(7))
    round_.exchange_shares(lost={3})
    round_.send_numbers()
    round_.confirm()
    round_.reveal()
    assert np.array_equal(round_.server.total(), round_.sum_of({0, 1, 2, 4, 5, 6}))


@pytest.mark.parametrize("owners", [12, 41])
def test_the_sum_is_exact_on_a_graph_of_few_neighbours(owners: int) -> None:
    round_ = Round(some_vectors(owners), neighbours=8)
    assert all(len(round_.roster.around(at)) == 8 for at in range(owners))
    assert all(
        at in round_.roster.around(near)
        for at in range(owners)
        for near in round_.roster.around(at)
    )
    silent = {5}
    assert np.array_equal(played(round_, silent, {2}), round_.sum_of(set(range(owners)) - silent))


def test_who_is_whose_neighbour_depends_on_everyones_keys() -> None:
    graphs = {
        tuple(map(tuple, (Round(some_vectors(20), neighbours=4).roster.around(i) for i in (0, 1))))
        for _ in range(8)
    }
    assert len(graphs) > 4


def test_masked_numbers_look_uniform() -> None:
    round_ = Round({f"owner-{i}": np.zeros(20_000, np.uint32) for i in range(3)})
    round_.exchange_shares()
    side = round_.owners[0]
    side.accept(round_.server.shares_for(0))
    masked = side.mask(np.zeros(20_000, np.uint32))
    counts, _ = np.histogram(masked, bins=16, range=(0, 2**32))
    chi2 = ((counts - 1250) ** 2 / 1250).sum()
    assert chi2 < 60  # 15 degrees of freedom: p < 3e-7


def test_a_mask_is_chacha20s_key_stream() -> None:
    # RFC 8439, appendix A.1, test vector 1: key and nonce of zeros, counter 0.
    vector = np.zeros(4, np.uint32)
    masks.add_mask(vector, bytes(32), 1)
    assert vector.tobytes().hex() == "76b8e0ada0f13d90405d6ae55386bd28"
    long = np.arange(700_000, dtype=np.uint64)  # more than one chunk
    masks.add_mask(long, b"k" * 32, 1)
    masks.add_mask(long, b"k" * 32, -1)
    assert np.array_equal(long, np.arange(700_000, dtype=np.uint64))


def test_the_state_survives_every_process() -> None:
    vectors = some_vectors(5)
    identities = {name: masks.new_key() for name in vectors}
    round_ = Round(vectors)
    sides = {n: OwnerSide(OCCASION, n, identities[n], 2) for n in vectors}
    adverts = [side.begin() for side in sides.values()]
    round_.server = MaskedSum.of(OCCASION, adverts, 0, 0.66)

    def again() -> None:
        round_.owners = {
            round_.server.place(n): OwnerSide.from_json(side.to_json(), identities[n])
            for n, side in sides.items()
        }
        sides.update({side.name: side for side in round_.owners.values()})

    for step in (round_.exchange_shares, round_.send_numbers, round_.confirm, round_.reveal):
        again()
        step()
    assert np.array_equal(round_.server.total(), round_.sum_of(range(5)))
    with pytest.raises(PrivacyError, match="damaged"):
        OwnerSide.from_json(b"{}", bytes(32))


# ---- a server that lies ---------------------------------------------------------------------


def upto(step: str, owners: int = 5, **options: object) -> Round:
    round_ = Round(some_vectors(owners), **options)  # type: ignore[arg-type]
    for name in ("exchange_shares", "send_numbers", "confirm", "reveal"):
        getattr(round_, name)()
        if name == step:
            break
    return round_


def test_an_owner_never_reveals_both_shares_of_one_owner() -> None:
    # The same round's end is asked for twice: as a survivor, then as a dropout.
    round_ = upto("send_numbers")
    victim, helper = 0, round_.owners[1]
    everyone_, without = [0, 1, 2, 3, 4], [1, 2, 3, 4]
    helper.confirm(everyone_)
    with pytest.raises(PrivacyError, match="each message is answered once"):
        helper.confirm(without)
    for at in (2, 3, 4):
        round_.server.take_confirmation(at, round_.owners[at].confirm(everyone_))
    signatures = {at: s for at, s in round_.server.signatures_for(1).items() if at != victim}
    assert helper.reveal(signatures)[victim][0] == OWN
    with pytest.raises(PrivacyError, match="each message is answered once"):
        helper.reveal(signatures)
    with pytest.raises(PrivacyError, match="each message is answered once"):
        helper.confirm(without)


def test_different_survivors_to_different_owners_open_nothing() -> None:
    # Half are told that owner 0 is in the sum, the others that it is not.
    round_ = upto("send_numbers", 7)
    with_, without = list(range(7)), list(range(1, 7))
    signatures = {at: round_.owners[at].confirm(with_) for at in (1, 2, 3)}
    signatures |= {at: round_.owners[at].confirm(without) for at in (4, 5, 6)}
    for at in range(1, 7):
        with pytest.raises(PrivacyError, match="confirm the same survivors=2"):
            round_.owners[at].reveal({n: s for n, s in signatures.items() if n != at})
        with pytest.raises(PrivacyError, match="each message is answered once"):
            round_.owners[at].reveal(signatures)


def test_an_owner_is_not_told_that_it_is_out_nor_left_alone() -> None:
    round_ = upto("send_numbers")
    with pytest.raises(PrivacyError, match="must hold this owner"):
        round_.owners[0].confirm([1, 2, 3, 4])
    with pytest.raises(PrivacyError, match="survivors among the neighbours=0"):
        round_.owners[0].confirm([0])
    with pytest.raises(PrivacyError, match="distinct owners"):
        round_.owners[0].confirm([0, 0, 1, 2, 3])
    with pytest.raises(PrivacyError, match="distinct owners"):
        round_.owners[0].confirm([0, 1, 2, 3, 9])


def test_a_round_cannot_be_played_again_with_other_numbers() -> None:
    # The same masks on two vectors: their difference would be the numbers' own.
    round_ = upto("send_numbers")
    side = round_.owners[0]
    with pytest.raises(PrivacyError, match="each message is answered once"):
        side.mask(np.zeros(50, np.uint32))
    with pytest.raises(PrivacyError, match="each message is answered once"):
        side.accept(round_.server.shares_for(0))
    with pytest.raises(PrivacyError, match="each message is answered once"):
        side.share(round_.roster, round_.adverts_for(0), everyone)
    with pytest.raises(PrivacyError, match="each message is answered once"):
        side.begin()


def test_shares_and_signatures_of_another_round_are_no_use() -> None:
    identity = masks.new_key()
    later = dataclasses.replace(OCCASION, round=2)
    advert = OwnerSide(OCCASION, "owner-9", identity).begin()
    with pytest.raises(PrivacyError, match="not of this round"):
        advert.check(later)
    round_, other = upto("exchange_shares"), upto("exchange_shares")
    with pytest.raises(PrivacyError, match="cannot be opened"):
        round_.owners[0].accept(other.server.shares_for(0))
    round_ = upto("confirm")
    other = upto("confirm")
    with pytest.raises(PrivacyError, match="confirm the same survivors=0"):
        round_.owners[0].reveal(other.server.signatures_for(0))


def known(round_: Round) -> Callable[[Advert], bool]:
    """Return the judgement of owners that know each other's keys."""
    keys = {advert.name: advert.identity for advert in round_.server.adverts}

    def counts(advert: Advert) -> bool:
        if advert.name in keys and keys[advert.name] != advert.identity:
            raise PrivacyError(f"keys of {advert.name!r}: its identity key is another")
        return advert.name in keys

    return counts


def test_keys_that_the_server_swaps_are_refused() -> None:
    round_ = Round(some_vectors(5))
    counts = known(round_)
    honest = round_.adverts_for(0)
    # Fresh keys under the owner's own identity: the signature is missing.
    swapped = dataclasses.replace(honest[0], masking=masks.public_key(masks.new_key()))
    with pytest.raises(PrivacyError, match="signature"):
        round_.owners[0].share(round_.roster, [swapped, *honest[1:]], counts)
    # A whole owner of the server's own under that name, in the roster too.
    own = OwnerSide(OCCASION, honest[0].name, masks.new_key()).begin()
    others = [a for a in round_.server.adverts if a.name != own.name]
    roster = Roster.of(OCCASION, [own, *others], 0, 0.66)
    victim = roster.digests.index(round_.roster.digests[0])
    at = {a.digest(OCCASION): a for a in [own, *others]}
    told = [at[roster.digests[near]] for near in roster.around(victim)]
    with pytest.raises(PrivacyError, match="identity key is another"):
        round_.owners[0].share(roster, told, counts)
    # Other keys than the roster names.
    with pytest.raises(PrivacyError, match="not those that the roster names"):
        round_.owners[0].share(round_.roster, [own, *honest[1:]], everyone)


def with_sybils(honest: int, sybils: int, fewest: int) -> tuple[Round, Callable[[Advert], bool]]:
    names = some_vectors(honest + sybils)
    round_ = Round(names, fewest=fewest)
    mine = {f"owner-{i}" for i in range(honest)}
    return round_, lambda advert: advert.name in mine


def test_an_owner_alone_among_the_servers_own_sends_nothing() -> None:
    round_, counts = with_sybils(1, 9, fewest=3)
    victim = round_.server.place("owner-0")
    with pytest.raises(PrivacyError, match="with known keys=0: must be >= 2"):
        round_.owners[victim].share(round_.roster, round_.adverts_for(victim), counts)


def test_too_many_strangers_could_take_a_mask_off() -> None:
    round_, counts = with_sybils(6, 4, fewest=3)
    victim = round_.server.place("owner-0")
    with pytest.raises(PrivacyError, match="without a known key=4: must be < 3"):
        round_.owners[victim].share(round_.roster, round_.adverts_for(victim), counts)
    round_, counts = with_sybils(8, 2, fewest=3)
    victim = round_.server.place("owner-0")
    round_.owners[victim].share(round_.roster, round_.adverts_for(victim), counts)


def test_strangers_cannot_stand_in_for_owners_that_dropped_out() -> None:
    round_ = Round(some_vectors(10), fewest=7)
    mine = {f"owner-{i}" for i in range(9)}
    round_.counts = lambda advert: advert.name in mine
    round_.exchange_shares()
    round_.send_numbers()
    victim, stranger = round_.server.place("owner-0"), round_.server.place("owner-9")
    near = [at for at in range(10) if at not in (victim, stranger)]
    with pytest.raises(PrivacyError, match="with known keys=5: must be >= 6"):
        round_.owners[victim].confirm([victim, stranger, *near[:5]])


def test_an_owner_of_two_names_or_two_keys_is_refused() -> None:
    identity = masks.new_key()
    sides = [OwnerSide(OCCASION, n, identity) for n in ("a", "b")]
    sides.append(OwnerSide(OCCASION, "c", masks.new_key()))
    adverts = [side.begin() for side in sides]
    roster = Roster.of(OCCASION, adverts, 0, 0.66)
    with pytest.raises(PrivacyError, match="one name or one identity"):
        sides[2].share(roster, adverts[:2], everyone)


def test_a_roster_without_the_owner_or_with_other_settings_is_refused() -> None:
    round_ = Round(some_vectors(5))
    without = Roster.of(OCCASION, round_.adverts_for(0), 0, 0.66)
    with pytest.raises(PrivacyError, match="own keys"):
        round_.owners[0].share(without, round_.adverts_for(0)[:3], everyone)
    foreign = dataclasses.replace(round_.roster, occasion=Occasion(7, 1, b"x" * 32))
    with pytest.raises(PrivacyError, match="these settings"):
        round_.owners[0].share(foreign, round_.adverts_for(0), everyone)
    with pytest.raises(PrivacyError, match="adverts of 3 peers"):
        round_.owners[0].share(round_.roster, round_.adverts_for(0)[:3], everyone)


def test_a_mask_key_of_small_order_is_refused() -> None:
    with pytest.raises(PrivacyError, match="X25519"):
        masks.agree(masks.new_key(), bytes(32), b"")


# ---- owners that lie ------------------------------------------------------------------------


def test_false_shares_are_noticed_and_named() -> None:
    cases = [
        (set[int](), OWN, "mask: do not fit its commitment"),
        ({0}, KEY, "mask key: do not fit"),
    ]
    for silent, kind, what in cases:
        round_ = Round(some_vectors(5))
        round_.exchange_shares()
        round_.send_numbers(lost=silent)
        round_.confirm()
        for at in sorted(round_.server.survivors):
            reveals = round_.owners[at].reveal(round_.server.signatures_for(at))
            if at == 1:
                false = bytes(32) + b"\1"
                reveals = {n: (k, false if k == kind else s) for n, (k, s) in reveals.items()}
            round_.server.take_reveals(at, reveals)
        with pytest.raises(PrivacyError, match=what):
            round_.server.total()


def test_the_server_refuses_what_is_not_due() -> None:
    round_ = upto("exchange_shares")
    vector = np.zeros(50, np.uint32)
    with pytest.raises(PrivacyError, match="uint64"):
        round_.server.take_numbers(0, vector.astype(np.uint64), np.dtype(np.uint32), 50)
    with pytest.raises(PrivacyError, match=r"\(49,\)"):
        round_.server.take_numbers(0, vector[:-1], np.dtype(np.uint32), 50)
    round_.server.take_numbers(0, vector, np.dtype(np.uint32), 50)
    with pytest.raises(PrivacyError, match="none are due"):
        round_.server.take_numbers(0, vector, np.dtype(np.uint32), 50)
    with pytest.raises(PrivacyError, match="for its neighbours"):
        round_.server.take_shares(1, {2: b""}, bytes(32))
    round_ = upto("confirm")
    with pytest.raises(PrivacyError, match="not of these survivors"):
        round_.server.take_confirmation(0, bytes(64))
    reveals = round_.owners[0].reveal(round_.server.signatures_for(0))
    kind, share = reveals[1]
    with pytest.raises(PrivacyError, match="not those due"):
        round_.server.take_reveals(0, {**reveals, 1: (KEY if kind == OWN else OWN, share)})
