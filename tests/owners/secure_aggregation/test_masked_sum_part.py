"""An owner's part in masked sums over its messages: what is on its disk, whose keys it believes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsplit.config import RunConfig
from fedsplit.errors import ConfigError, PolicyError, PrivacyError, SessionError
from fedsplit.owners.home import OwnerHome
from fedsplit.owners.identity import OwnerIdentity
from fedsplit.owners.ledger.chain import Ledger
from fedsplit.owners.ledger.check import DisclosureCheck
from fedsplit.owners.ledger.disclosure import Training, Weights
from fedsplit.owners.ledger.session import SessionFacts
from fedsplit.owners.policy.rules import Asked, Policy
from fedsplit.owners.secure_aggregation.part import SumPart
from fedsplit.owners.secure_aggregation.peers import identity_of
from fedsplit.owners.task import OwnerTask
from fedsplit.privacy.secret import OwnerSecret
from fedsplit.privacy.secure_aggregation.numbers import Numbers, occasion_of, quantiser_of
from fedsplit.privacy.secure_aggregation.roster import Advert
from fedsplit.settings import read_settings
from fedsplit.wire import secure_sum as wire
from fedsplit.wire.messages import SessionOffer
from strategies.secure_aggregation.masked_sum import MaskedSum

RUN = 5
FLAT: dict[str, Any] = {
    "strategy": "offsite-tuning",
    "secure.aggregation": True,
    "robust.clip": 0.0,
    "robust.weight-cap": 0.0,
    "robust.screen": False,
}
START = {"w": torch.zeros(2, 3)}


class Machine:
    """An owner's machine: home, policy, ledger; each message meets a new :class:`SumPart`."""

    def __init__(self, folder: Path, name: str, rules: str = "", secret: bytes = b"") -> None:
        self.home = OwnerHome(folder / name)
        self.policy = Policy.parse(rules.encode())
        key = OwnerSecret(secret or name.encode().ljust(32, b"."))
        self.identity = OwnerIdentity(name, self.home, key, {})
        self.ledger = Ledger(self.home.root)

    def task(self, number: int = 1, **changes: Any) -> OwnerTask:
        config = read_settings({**FLAT, **changes})
        offer = SessionOffer(RUN, 1, number, "train", "stream", "token")
        name = self.identity.name
        facts = SessionFacts(RUN, name, number, "train", "", "emulator", config.strategy)
        check = DisclosureCheck(self.ledger, facts, self.policy, self.identity.secret)
        return OwnerTask(config, offer, self.identity, check)

    def answer(self, phase: str, number: int = 1, **values: Any) -> wire.Values:
        return SumPart(self.task(number)).answer({"phase": phase, **values})

    def numbers(self, sealed: wire.Values, to: float, number: int = 1) -> np.ndarray[Any, Any]:
        task = self.task(number)
        task.check.release(Training(steps=1, batch=1, samples=1))
        weights = {"w": torch.full((2, 3), to)}
        return SumPart(task).mask(sealed, weights, START, {"targets": 10, "loss": 2.0})

    def lines(self) -> list[dict[str, Any]]:
        text = (self.home.root / "ledger.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]


class Sum:
    """The server of one masked sum over machines, honest unless a test does otherwise."""

    def __init__(self, machines: list[Machine], number: int = 1) -> None:
        self.config: RunConfig = read_settings(FLAT)
        self.number = number
        occasion = occasion_of(self.config, RUN, number)
        adverts = [Advert.from_bytes(m.answer(wire.KEYS, number)["advert"]) for m in machines]
        self.sum = MaskedSum.of(occasion, adverts, 0, self.config.secure.threshold)
        self.machines = {self.sum.place(m.identity.name): m for m in machines}

    def roster_for(self, at: int) -> dict[str, Any]:
        adverts = [self.sum.adverts[near].to_bytes() for near in self.sum.roster.around(at)]
        return {"roster": b"".join(self.sum.roster.digests), "adverts": adverts}

    def share(self) -> None:
        for at, machine in self.machines.items():
            found = machine.answer(wire.SHARES, self.number, **self.roster_for(at))
            sealed = wire.table_of(found, wire.SEALED_BYTES)
            self.sum.take_shares(at, sealed, found["commitment"])

    def collect(self, lost: int = -1) -> None:
        self.quantiser = quantiser_of(self.config, len(self.machines))
        self.layout = Numbers({"w": (2, 3)})
        for at, machine in self.machines.items():
            if at != lost:
                sealed = wire.pack_table(self.sum.shares_for(at))
                vector = machine.numbers(sealed, 0.01 * (1 + at), self.number)
                self.sum.take_numbers(at, vector, self.quantiser.dtype, self.layout.size)

    def finish(self) -> Any:
        told = wire.pack_places(sorted(self.sum.survivors))
        for at in sorted(self.sum.survivors):
            found = self.machines[at].answer(wire.CONFIRM, self.number, survivors=told)
            self.sum.take_confirmation(at, found["signature"])
        for at in sorted(self.sum.survivors):
            asked = wire.pack_table(self.sum.signatures_for(at))
            found = self.machines[at].answer(wire.REVEAL, self.number, **asked)
            reveals = {
                near: (kind, share)
                for kind in ("mask", "key")
                for near, share in wire.table_of(found, wire.SHARE_BYTES, kind).items()
            }
            self.sum.take_reveals(at, reveals)
        return self.layout.decode(self.quantiser, self.sum.total(), len(self.sum.survivors))


def machines(folder: Path, count: int = 5, rules: str = "") -> list[Machine]:
    return [Machine(folder, f"owner-{i}", rules) for i in range(count)]


def test_a_sum_over_messages_and_what_the_ledger_says_of_it(tmp_path: Path) -> None:
    made = machines(tmp_path)
    found_sum = Sum(made)
    found_sum.share()
    found_sum.collect(lost=0)
    found = found_sum.finish()
    assert np.abs(found.changes["w"] - 0.01 * np.mean([2, 3, 4, 5])).max() <= found.error + 1e-9
    assert (found.weight, found.loss) == (40, pytest.approx(2.0, abs=1e-3))
    lines = found_sum.machines[1].lines()
    kinds = [line["kind"] for line in lines]
    assert kinds == ["secure-sum", "secure-sum", "training", "masked-weights", *["secure-sum"] * 2]
    assert [line.get("phase") for line in lines if "phase" in line] == [
        "keys",
        "shares",
        "confirm",
        "reveal",
    ]
    assert lines[3]["owners"] == 5
    state = found_sum.machines[1].home.root / "runs" / f"{RUN}-1" / "masked-sum.json"
    assert state.stat().st_mode & 0o077 == 0
    assert json.loads(state.read_text())["keys"] == ["", "", ""]  # forgotten


def test_nothing_is_answered_twice_nor_a_round_played_again(tmp_path: Path) -> None:
    found = Sum(machines(tmp_path))
    found.share()
    found.collect()
    at, machine = next(iter(found.machines.items()))
    with pytest.raises(PrivacyError, match="each message is answered once"):
        machine.answer(wire.KEYS)
    with pytest.raises(PrivacyError, match="each message is answered once"):
        machine.answer(wire.SHARES, **found.roster_for(at))
    with pytest.raises(PrivacyError, match="each message is answered once"):
        machine.numbers(wire.pack_table(found.sum.shares_for(at)), 0.5)
    found.finish()
    with pytest.raises(PrivacyError, match="each message is answered once"):
        machine.answer(wire.REVEAL, **wire.pack_table(found.sum.signatures_for(at)))
    later = Sum([*found.machines.values()], number=2)
    with pytest.raises(PrivacyError, match="at round 2 already"):
        machine.answer(wire.KEYS, 1)
    with pytest.raises(PrivacyError, match="began that of round 2"):
        machine.answer(wire.CONFIRM, 1, survivors=b"")
    later.share()


def test_a_first_key_is_believed_and_a_second_is_not(tmp_path: Path) -> None:
    made = machines(tmp_path)
    first = Sum(made)
    first.share()
    assert len(json.loads((made[0].home.root / "peers.json").read_text())) == 4
    # In the next round the server says owner-1's name with keys of its own.
    impostor = Machine(tmp_path / "server", "owner-1", secret=b"s" * 32)
    second = Sum([made[0], impostor, *made[2:]], number=2)
    at = second.sum.place("owner-0")
    with pytest.raises(PrivacyError, match="'owner-1': its identity key is"):
        made[0].answer(wire.SHARES, 2, **second.roster_for(at))


def test_a_policys_peers_alone_count(tmp_path: Path) -> None:
    made = machines(tmp_path)
    keys = tmp_path / "keys"
    keys.mkdir()
    for machine in made[:3]:
        (keys / f"{machine.identity.name}.pub").write_text(identity_of(machine.identity) + "\n")
    rules = f'[offsite]\npeers = "{keys}"\nrequire_secure_aggregation = '
    for fewest, told in ((4, "with known keys=2: must be >= 3"), (3, "without a known key=2")):
        careful = Machine(tmp_path / str(fewest), "owner-0", rules + str(fewest))
        found = Sum(
            [careful, *(Machine(tmp_path / str(fewest), f"owner-{i}") for i in range(1, 5))]
        )
        at = found.sum.place("owner-0")
        with pytest.raises(PrivacyError, match=told):
            careful.answer(wire.SHARES, **found.roster_for(at))
    (keys / "owner-3.pub").write_text("no key")
    with pytest.raises(ConfigError, match=r"owner-3\.pub is none"):
        careful.answer(wire.SHARES, **found.roster_for(at))


def test_weights_in_the_clear_are_refused_by_the_rule(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "owner-0", "[offsite]\nrequire_secure_aggregation = 3")
    task = machine.task()
    task.check.release(Training(steps=1, batch=1, samples=1))
    with pytest.raises(PolicyError, match=r"require_secure_aggregation.*secure\.aggregation"):
        task.check.release(Weights(tensors=START))
    plain = {**FLAT, "secure.aggregation": False}
    breaches = machine.policy.settings_breaches(Asked(dict(read_settings(plain).to_flat())))
    assert [b.rule for b in breaches] == ["offsite.require_secure_aggregation"]
    assert not machine.policy.settings_breaches(Asked(dict(read_settings(FLAT).to_flat())))
    with pytest.raises(ConfigError, match="must be true"):
        SumPart(machine.task(**{"secure.aggregation": False}))


@pytest.mark.parametrize(
    ("phase", "values"),
    [
        ("numbers", {}),
        ("shares", {"roster": b"x"}),
        ("shares", {"roster": b"", "adverts": "text"}),
        ("confirm", {"survivors": 3}),
        ("reveal", {"places": b"\1\0\0\0", "rows": b""}),
        ("reveal", {"places": b"\1\0\0\0" * 2, "rows": bytes(128)}),
    ],
)
def test_malformed_messages_are_refused(tmp_path: Path, phase: str, values: dict[str, Any]) -> None:
    machine = Machine(tmp_path, "owner-0")
    machine.answer(wire.KEYS)
    with pytest.raises((SessionError, PrivacyError)):
        machine.answer(phase, **values)
