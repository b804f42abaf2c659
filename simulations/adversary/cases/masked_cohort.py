"""Masked sums for the adversary: the victim, honest owners and the server's own, round by round."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import Message

from fedsplit.config import RunConfig
from fedsplit.emulators.build import tune_inside
from fedsplit.emulators.files import load_emulator
from fedsplit.emulators.settings import method_settings
from fedsplit.privacy.secret import OwnerSecret
from fedsplit.privacy.secure_aggregation import shamir
from fedsplit.privacy.secure_aggregation.masks import commit, identity_public, new_key, public_key
from fedsplit.privacy.secure_aggregation.numbers import occasion_of, quantiser_of
from fedsplit.privacy.secure_aggregation.owner import KEY, OWN, OwnerSide
from fedsplit.privacy.secure_aggregation.roster import Advert, Roster
from fedsplit.settings import read_settings
from fedsplit.wire import secure_sum as wire
from fedsplit.wire.message_types import SECURE_TYPE
from fedsplit.wire.messages import WEIGHTS, weights_record
from simulations.adversary.cases.offsite import emulator, long_texts, offsite_settings
from simulations.adversary.context import Field
from simulations.adversary.material import word_tokenizer
from simulations.adversary.server import RUNS, Taken, files_script
from simulations.adversary.victim import strict_policy

VICTIM = "victim"
FEWEST = 3
Values = Mapping[str, Any]


class Federation:
    """The victim and honest owners that know each other, and a server that lies.

    Args:
        field: where the case is played.
    """

    def __init__(self, field: Field) -> None:
        self.field = field
        texts = long_texts(field, 40)
        tokenizer = word_tokenizer(texts.words)
        folder = field.new_folder("emulator")
        _, self.digest, self.files = emulator(folder, tokenizer)
        self.identities = {f"friend-{i}": new_key() for i in range(9)}
        peers = field.new_folder("peers")
        for name, key in self.identities.items():
            (peers / f"{name}.pub").write_text(identity_public(key).hex())
        policy = strict_policy(
            app__strategies=["offsite-tuning"],
            offsite__require_dp=None,
            offsite__require_secure_aggregation=FEWEST,
            offsite__peers=str(peers),
        )
        self.victim = field.victim(texts, policy)
        self.flat = offsite_settings(
            secure__aggregation=True,
            secure__bound=1.0,
            robust__clip=0.0,
            robust__weight_cap=0.0,
            robust__screen=False,
            train__rounds=20,
        )
        config = read_settings(self.flat)
        made = tune_inside(
            load_emulator(folder / "emulator"), method_settings(config.offsite, config.seed)
        )
        self.start = {name: t.float().numpy() for name, t in made.state().items()}
        known = {name: identity_public(key) for name, key in self.identities.items()}
        secret = OwnerSecret(self.victim.secret)
        known[VICTIM] = identity_public(secret.key("fedsplit.masked-sum.identity"))
        self.known = known
        self.run = 0

    def counts(self, advert: Advert) -> bool:
        """Return whether an honest owner knows a key."""
        return self.known.get(advert.name) == advert.identity

    def cohort(self, friends: int = 5, sybils: int = 0, flat: Values | None = None) -> Cohort:
        """Begin a new round of a new run."""
        self.run = next(RUNS)
        return Cohort(self, 1, friends, sybils, flat)


class Cohort:
    """One round's sum: the victim, honest owners, and owners of the server's own.

    Args:
        federation: whose round it is.
        number: of the round.
        friends: honest owners, whose keys the victim knows.
        sybils: the server's.
        flat: the run's settings, if other ones.
    """

    def __init__(
        self,
        federation: Federation,
        number: int,
        friends: int,
        sybils: int,
        flat: Values | None = None,
    ) -> None:
        self.federation, self.number = federation, number
        self.flat = dict(flat or federation.flat)
        self.config: RunConfig = read_settings(self.flat)
        self.run = federation.run
        self.occasion = occasion_of(self.config, self.run, number)
        names = [f"friend-{i}" for i in range(friends)]
        keys = {name: federation.identities[name] for name in names}
        keys |= {f"sybil-{i}": new_key() for i in range(sybils)}
        self.sides = {n: OwnerSide(self.occasion, n, k, FEWEST) for n, k in keys.items()}
        self.friends = names
        reply = self.ask(wire.KEYS, {})
        self.begun = not reply.has_error()
        adverts = [side.begin() for side in self.sides.values()]
        if self.begun:
            told = wire.read_record(reply.content, wire.KEYS)
            adverts.append(Advert.from_bytes(told["advert"]))
        self.adverts = {advert.name: advert for advert in adverts}
        secure = self.config.secure
        self.roster = Roster.of(self.occasion, adverts, secure.neighbours, secure.threshold)
        order = sorted(adverts, key=lambda advert: advert.digest(self.occasion))
        self.names = [advert.name for advert in order]
        self.sealed: dict[str, dict[int, bytes]] = {}
        self.commitment = b""

    def at(self, name: str) -> int:
        """Return an owner's place."""
        return self.names.index(name)

    def around(self, name: str) -> list[Advert]:
        """Return the adverts of an owner's neighbours."""
        return [self.adverts[self.names[near]] for near in self.roster.around(self.at(name))]

    def ask(self, phase: str, values: Values, flat: Values | None = None) -> Message:
        """Ask the victim one message of the sum."""
        content = self.federation.field.server.offer(
            self.run, "train", digest=self.federation.digest, round=self.number
        )
        content[wire.SECURE] = wire.secure_record(phase, **values)
        return self.federation.victim.ask(SECURE_TYPE, content, self.run, flat or self.flat)

    def roster_values(self, adverts: Sequence[Advert]) -> dict[str, Any]:
        """Return the values of the message that names the roster."""
        texts = [advert.to_bytes() for advert in adverts]
        return {"roster": b"".join(self.roster.digests), "adverts": texts}

    def share(self, flat: Values | None = None, adverts: Sequence[Advert] | None = None) -> bool:
        """Ask the victim for its shares; return whether it answered."""
        told = self.around(VICTIM) if adverts is None else adverts
        reply = self.ask(wire.SHARES, self.roster_values(told), flat)
        if reply.has_error():
            return False
        found = wire.read_record(reply.content, wire.SHARES)
        self.sealed[VICTIM] = wire.table_of(found, wire.SEALED_BYTES)
        self.commitment = found["commitment"]
        return True

    def others_share(self) -> None:
        """Let everybody else share, and the sums of honest others go on."""
        for name, side in self.sides.items():
            shared = side.share(self.roster, self.around(name), self.federation.counts)
            self.sealed[name] = shared.sealed

    def sealed_for(self, name: str) -> dict[int, bytes]:
        """Return what the others have sealed for an owner."""
        at = self.at(name)
        return {self.at(sender): table[at] for sender, table in self.sealed.items() if at in table}

    def train(self, flat: Values | None = None, *, masked: bool = True) -> Taken:
        """Ask the victim for its numbers."""
        whole = self.federation
        content = whole.field.server.offer(
            self.run, "train", digest=whole.digest, round=self.number
        )
        content[WEIGHTS] = weights_record(whole.start)
        if masked:
            values = wire.pack_table(self.sealed_for(VICTIM))
            content[wire.SECURE] = wire.secure_record(wire.NUMBERS, **values)
        script = files_script(whole.files)
        return whole.field.server.message(
            whole.victim, flat or self.flat, script, "train", content, self.run
        )

    def others_mask(self) -> None:
        """Let everybody else send numbers: zeros are as good as any here."""
        dtype = quantiser_of(self.config, len(self.names)).dtype
        for name, side in self.sides.items():
            side.accept(self.sealed_for(name))
            side.mask(np.zeros(8, dtype))

    def to_the_numbers(self) -> bool:
        """Play honestly until everybody's numbers have come; return whether they have."""
        if not (self.begun and self.share()):
            return False
        self.others_share()
        sent = self.train().masked is not None
        self.others_mask()
        return sent

    def confirm(self, survivors: Collection[str]) -> bytes:
        """Ask the victim to sign who is in the sum; empty where it refuses."""
        places = wire.pack_places(sorted(map(self.at, survivors)))
        reply = self.ask(wire.CONFIRM, {"survivors": places})
        if reply.has_error():
            return b""
        signature: bytes = wire.read_record(reply.content, wire.CONFIRM)["signature"]
        return signature

    def reveal(self, signatures: Mapping[int, bytes]) -> dict[int, tuple[str, bytes]]:
        """Ask the victim for shares in the clear; none where it refuses."""
        reply = self.ask(wire.REVEAL, wire.pack_table(signatures))
        if reply.has_error():
            return {}
        found = wire.read_record(reply.content, wire.REVEAL)
        return {
            at: (kind, share)
            for kind in (OWN, KEY)
            for at, share in wire.table_of(found, wire.SHARE_BYTES, kind).items()
        }

    def is_undone(self, seeds: Mapping[int, bytes], keys: Mapping[int, bytes]) -> bool:
        """Return whether shares of the victim's seed and mask key (by point) open both."""
        if min(len(seeds), len(keys)) < self.roster.threshold:
            return False
        seed = shamir.combine(seeds, self.roster.threshold)
        key = shamir.combine(keys, self.roster.threshold)
        about = self.roster.digest + self.at(VICTIM).to_bytes(4, "little")
        opened = commit(seed, about) == self.commitment
        return opened and public_key(key) == self.adverts[VICTIM].masking
