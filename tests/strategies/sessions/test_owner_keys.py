"""Names belong to node keys: a second claimant is refused, in every strategy."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from typer.testing import CliRunner

from fedsplit.cli import app_cli
from fedsplit.config import LineageConfig, RunConfig
from fedsplit.errors import ConfigError, SessionError
from strategies.rounds.client_manager import ClientManager
from strategies.rounds.lineage_watch import LineageWatch
from strategies.sessions.owner_keys import VARIABLE, OwnerKeys, OwnerNames, fingerprint


def key() -> Any:
    return ec.generate_private_key(ec.SECP384R1()).public_key()


def pem(public: Any) -> bytes:
    return bytes(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


def ssh(public: Any) -> bytes:
    return bytes(public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))


def grid(**nodes: Any) -> Any:
    """A grid whose nodes n1, n2 ... have these keys."""
    infos = [
        SimpleNamespace(node_id=int(n[1:]), public_key=b"" if k is None else pem(k))
        for n, k in nodes.items()
    ]
    return SimpleNamespace(get_nodes=lambda: infos)


@pytest.fixture(autouse=True)
def _on_a_real_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (VARIABLE, "FEDSPLIT_SIMULATION"):
        monkeypatch.delenv(name, raising=False)


def test_a_key_is_the_same_in_every_form() -> None:
    public = key()
    der = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert fingerprint(pem(public)) == fingerprint(ssh(public)) == fingerprint(der)
    assert fingerprint(pem(public)) != fingerprint(pem(key()))
    assert fingerprint(b"no key") == fingerprint(b"no key")


def test_a_name_is_its_first_keys_even_when_that_node_is_gone() -> None:
    first, second = key(), key()
    names = OwnerNames()
    names.connected(grid(n1=first, n2=second))
    names.claim(1, "alice")
    names.claim(1, "alice")
    with pytest.raises(SessionError, match="another node has it already"):
        names.claim(2, "alice")
    names.connected(grid(n2=second))
    with pytest.raises(SessionError, match="belongs to another node key"):
        names.claim(2, "alice")
    names.connected(grid(n2=second, n7=first))  # the same key under another id
    names.claim(7, "alice")
    names.claim(2, "bob")
    assert names.names == {7: "alice", 2: "bob"}
    with pytest.raises(SessionError, match="must be 'bob', as before"):
        names.claim(2, "carol")


def test_one_key_has_one_name_over_nodes_and_restarts() -> None:
    mine = key()
    before = manager()
    before.owners.connected(grid(n1=mine, n2=mine))  # whatever Flower lets in
    before.claim(1, "alice")
    with pytest.raises(SessionError, match="its node key has the name 'alice' already"):
        before.claim(2, "bob")
    assert before.names == {1: "alice"}
    after = manager()
    after.restore(before.state(), [])
    after.owners.connected(grid(n9=mine))
    with pytest.raises(SessionError, match="its node key has the name 'alice' already"):
        after.claim(9, "new")  # it would leave alice's blame behind
    after.claim(9, "alice")


def test_names_that_the_grid_knows_are_claimed_as_if_they_were_said() -> None:
    keys = [key() for _ in range(3)]
    nodes = grid(**{f"n{n}": k for n, k in enumerate(keys, 1)})
    names = OwnerNames()
    names.connected(nodes)
    names.take_known(nodes)  # a real grid knows none
    assert names.names == {}
    nodes.owner_names = {1: "alice", 2: "bob"}
    names.take_known(nodes)
    assert names.names == {1: "alice", 2: "bob"}
    nodes.owner_names = {1: "other", 2: "bob", 3: "bob"}  # node 1 has its name
    with pytest.raises(SessionError, match="another node has it already"):
        names.take_known(nodes)
    assert names.names == {1: "alice", 2: "bob"}
    twice = OwnerNames()
    twice.connected(nodes)
    nodes.owner_names = {2: "bob", 3: "bob"}
    with pytest.raises(SessionError, match="another node has it already"):
        twice.take_known(nodes)


def test_the_servers_list_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alice, other = key(), key()
    (tmp_path / "alice").mkdir()
    (tmp_path / "alice" / "node.pub").write_bytes(ssh(alice) + b"\n")
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    names = OwnerNames()
    names.connected(grid(n1=alice, n2=other, n3=None))
    for node, name in ((2, "alice"), (3, "alice")):
        with pytest.raises(SessionError, match="belongs to another node key"):
            names.claim(node, name)
    with pytest.raises(SessionError, match="not on the server's list"):
        names.claim(2, "mallory")
    names.claim(1, "alice")
    assert names.names == {1: "alice"}


def test_the_list_is_the_folder_that_keys_init_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = ["keys", "init", str(tmp_path / "keys"), "--host", "fed.example.org"]
    result = CliRunner().invoke(app_cli, [*made, "--owner", "alice", "--owner", "bob"])
    assert result.exit_code == 0, result.output
    monkeypatch.setenv(VARIABLE, str(tmp_path / "keys" / "owners"))
    assert sorted(OwnerKeys.from_environment().bound) == ["alice", "bob"]


@pytest.mark.parametrize("folder", ["missing", "."])
def test_a_list_without_a_key_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / folder))
    with pytest.raises(ConfigError, match=r"must hold NAME/node\.pub"):
        OwnerKeys.from_environment()


def manager() -> ClientManager:
    return ClientManager(RunConfig(), LineageWatch(LineageConfig(gate="off"), None))


def test_bindings_survive_a_restart() -> None:
    first, second = key(), key()
    before = manager()
    before.owners.connected(grid(n1=first))
    before.claim(1, "alice")
    after = manager()
    after.restore(before.state(), [])
    after.owners.connected(grid(n5=second, n6=first))
    with pytest.raises(SessionError, match="belongs to another node key"):
        after.claim(5, "alice")
    after.claim(6, "alice")


def test_simulated_nodes_have_keys_of_the_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSPLIT_SIMULATION", "1")
    before = manager()
    before.owners.connected(grid(n1=key()))
    before.claim(1, "owner-0")
    after = manager()
    after.restore(before.state(), [])
    after.owners.connected(grid(n9=key()))
    after.claim(9, "owner-0")


@pytest.mark.parametrize("strategy", ["offsite", "split"])
def test_a_node_that_says_anothers_name_is_refused_and_reported_as_itself(
    make_config: Any, offsite: Any, tmp_path: Path, strategy: str
) -> None:
    from simulations.runtime.federated import read_server
    from tests.strategies.local_grid import LocalGrid

    make = offsite if strategy == "offsite" else make_config
    config = make(train__rounds=2, train__max_steps=1, data__owners=3, output__evaluate_every=0)
    thief, victim = 1, 0
    federation = LocalGrid(config, 3)
    nodes = {index: node for node, index in federation.nodes.items()}
    federation.node_configs[thief] = {"owner": "owner-0"}
    from strategies.offsite_tuning.strategy import OffsiteTuning
    from strategies.split_tuning.strategy import SplitTuning

    kinds: dict[str, Any] = {"offsite": OffsiteTuning, "split": SplitTuning}
    with kinds[strategy].open(config, run_id=7) as made:
        made.clients.names[nodes[victim]] = "owner-0"  # it came first
        made.start(federation)
    rows = read_server(Path(config.output.dir))["rounds"]
    for row in rows:
        assert list(row["train"]["lost"]) == [f"node {nodes[thief]}"]
        assert "another node has it already" in row["train"]["lost"][f"node {nodes[thief]}"]
        assert sorted(row["train"]["metrics"]["owners"]) == ["owner-0", "owner-2"]
