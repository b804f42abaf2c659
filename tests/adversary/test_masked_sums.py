"""A server that lies about a masked sum, to an owner's real ClientApp."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from fedsplit.privacy.secure_aggregation import shamir
from fedsplit.privacy.secure_aggregation.masks import identity_public, new_key
from fedsplit.privacy.secure_aggregation.numbers import occasion_of
from fedsplit.privacy.secure_aggregation.owner import OwnerSide
from fedsplit.privacy.secure_aggregation.roster import Advert
from fedsplit.settings import read_settings
from fedsplit.wire import secure_sum as wire
from fedsplit.wire.message_types import SECURE_TYPE
from simulations.adversary.cases.masked_cohort import Federation
from simulations.adversary.context import Field
from strategies.secure_aggregation.masked_sum import MaskedSum
from tests.adversary.lying import LyingServer, Owner, settings

RUN = 77
FLAT = settings(
    strategy="offsite-tuning",
    model__task="causal-lm",
    secure__aggregation=True,
    robust__clip=0.0,
    robust__weight_cap=0.0,
    robust__screen=False,
)


def ask(server: LyingServer, owner: Owner, phase: str, flat: Any = FLAT, **values: Any) -> Message:
    content = server.offer(RUN, "train", digest="ab" * 32)
    content[wire.SECURE] = wire.secure_record(phase, **values)
    return owner.ask(SECURE_TYPE, content, RUN, flat)


def begun(server: LyingServer, owner: Owner, others: int) -> tuple[MaskedSum, int]:
    """Return a round of the victim and of owners that are all the server's own."""
    reply = ask(server, owner, wire.KEYS)
    assert not reply.has_error(), reply.error
    advert = Advert.from_bytes(wire.read_record(reply.content, wire.KEYS)["advert"])
    occasion = occasion_of(read_settings(FLAT), RUN, 1)
    made = [OwnerSide(occasion, f"sybil-{i}", new_key()).begin() for i in range(others)]
    found = MaskedSum.of(occasion, [advert, *made], 0, 0.66)
    return found, found.place("victim")


def roster_of(found: MaskedSum, at: int) -> dict[str, Any]:
    adverts = [found.adverts[near].to_bytes() for near in found.roster.around(at)]
    return {"roster": b"".join(found.roster.digests), "adverts": adverts}


def refusal(reply: Message) -> str:
    assert reply.has_error()
    return str(reply.error.reason)


def test_a_message_of_a_sum_is_answered_once_and_refusals_name_no_values(
    server: LyingServer, owner: Callable[..., Owner]
) -> None:
    victim = owner()
    found, at = begun(server, victim, 4)
    again = refusal(ask(server, victim, wire.KEYS))
    assert again.startswith("PrivacyError")
    assert "round" not in again
    shares = ask(server, victim, wire.SHARES, **roster_of(found, at))
    assert not shares.has_error()
    for phase, values in (
        (wire.SHARES, roster_of(found, at)),
        (wire.CONFIRM, {"survivors": wire.pack_places([at])}),
        (wire.REVEAL, {"places": b"", "rows": b""}),
        (wire.NUMBERS, {"places": b"", "rows": b""}),
    ):
        assert refusal(ask(server, victim, phase, **values))
    left = [line for line in victim.ledger() if line["kind"] not in ("error", "repair")]
    assert [line["phase"] for line in left] == [wire.KEYS, wire.SHARES]


@pytest.mark.parametrize("peers", [True, False])
def test_owners_of_the_servers_own_do_not_count_where_keys_are_known(
    server: LyingServer, owner: Callable[..., Owner], tmp_path: Path, peers: bool
) -> None:
    folder = tmp_path / "peers"
    folder.mkdir()
    (folder / "friend.pub").write_text(identity_public(new_key()).hex())
    rules = "[offsite]\nrequire_secure_aggregation = 3\n"
    victim = owner(rules + (f'peers = "{folder}"\n' if peers else ""))
    found, at = begun(server, victim, 9)
    reply = ask(server, victim, wire.SHARES, **roster_of(found, at))
    # Without a list the first keys are believed: the page on secure aggregation says so.
    assert reply.has_error() is peers


def test_an_owner_is_undone_by_both_of_its_secrets_and_by_no_less(tmp_path: Path) -> None:
    """What the experiment calls read is what would really take the masks off."""
    with LyingServer() as server:
        cohort = Federation(Field(tmp_path, server, quick=True)).cohort(5, 1)
        assert cohort.begun
        assert cohort.share()
        cohort.others_share()
        at, half = cohort.at("victim"), shamir.SHARE_BYTES
        seeds, keys = {}, {}
        for name, side in cohort.sides.items():  # as if every honest owner were the server's own
            side.accept(cohort.sealed_for(name))
            told = json.loads(side.to_json())["peers"][str(at)]["shares"]
            share = bytes.fromhex(told)
            seeds[cohort.at(name) + 1], keys[cohort.at(name) + 1] = share[:half], share[half:]
        assert cohort.is_undone(seeds, keys)
        threshold = cohort.roster.threshold
        fewer = dict(list(keys.items())[: threshold - 1])
        assert not cohort.is_undone(seeds, fewer)
        assert not cohort.is_undone(keys, seeds)


def test_a_run_without_masks_gets_no_message_of_a_sum(
    server: LyingServer, owner: Callable[..., Owner]
) -> None:
    plain = {**FLAT, "secure.aggregation": False}
    assert refusal(ask(server, owner(), wire.KEYS, plain)).startswith("ConfigError")
    serving = {**plain, "strategy": "serving"}
    assert refusal(ask(server, owner(), wire.KEYS, serving)).startswith("SessionError")
    strict = owner("[offsite]\nrequire_secure_aggregation = 3\n", name="strict")
    told = refusal(ask(server, strict, wire.KEYS, plain))
    assert "offsite.require_secure_aggregation" in told
