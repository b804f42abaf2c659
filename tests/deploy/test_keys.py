"""Key folders: who can read what, who vouches for whom, and that nothing is ever overwritten."""

from __future__ import annotations

import contextlib
import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from typer.testing import CliRunner

from fedsplit.cli import app_cli
from fedsplit.deploy import keys
from fedsplit.deploy.certificates import Issued, hosts_of, issue, load_certificate, make_authority
from fedsplit.deploy.keys import (
    add_owner,
    explain,
    fingerprint,
    make_keys,
    make_node,
    renew_server,
)
from fedsplit.errors import ConfigError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys") / "federation"
    return make_keys(
        folder,
        ["fed.example.org", "192.0.2.10"],
        ["hospital", "bank"],
        client_certificates=True,
    )


def faults(folder: Path) -> dict[str, str]:
    return {x.path: x.fault for x in explain(folder) if x.fault}


def test_private_files_are_private_and_public_ones_are_not(made: Path) -> None:
    for path in [made, *made.rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        expected = 0o700 if path.is_dir() else 0o600 if path.suffix == ".key" else 0o644
        assert mode == expected, path
    assert not list(made.rglob("*.secret"))  # an owner draws its own
    assert not [p for p in made.parent.iterdir() if p != made]  # no draft is left


def test_a_node_key_is_what_flower_loads(made: Path) -> None:
    folder = made / "owners" / "hospital"
    private = load_ssh_private_key((folder / "node.key").read_bytes(), None)
    public = load_ssh_public_key((folder / "node.pub").read_bytes())
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert isinstance(private.curve, ec.SECP384R1)
    assert private.public_key() == public
    other = (made / "owners" / "bank" / "node.pub").read_bytes()
    assert load_ssh_public_key(other) != public


def shake_hands(made: Path, name: str, *, client: Path | None, ask: bool) -> str:
    """Serve one TLS connection with the folder's certificate; return the protocol spoken."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(made / "server/server.pem", made / "server/server.key")
    if ask:
        server.verify_mode = ssl.CERT_REQUIRED
        server.load_verify_locations(made / "ca.pem")
    context = ssl.create_default_context(cafile=str(made / "ca.pem"))
    if client is not None:
        context.load_cert_chain(client / "client.pem", client / "client.key")
    ours, theirs = socket.socketpair()

    def serve() -> None:
        try:
            with server.wrap_socket(theirs, server_side=True) as wrapped:
                wrapped.sendall(b"x")
        except ssl.SSLError:
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with context.wrap_socket(ours, server_hostname=name) as wrapped:
            assert wrapped.recv(1) == b"x"
            return str(wrapped.version())
    finally:
        ours.close()
        thread.join(10)


@pytest.mark.parametrize("name", ["fed.example.org", "192.0.2.10", "localhost", "127.0.0.1"])
def test_the_server_is_believed_under_its_names(made: Path, name: str) -> None:
    assert shake_hands(made, name, client=None, ask=False) == "TLSv1.3"


def test_the_server_is_not_believed_under_another_name(made: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="not valid for"):
        shake_hands(made, "evil.example.org", client=None, ask=False)


def test_client_certificates_are_for_clients(made: Path, tmp_path: Path) -> None:
    owner = made / "owners" / "bank"
    assert shake_hands(made, "localhost", client=owner, ask=True) == "TLSv1.3"
    with pytest.raises((ssl.SSLError, OSError, AssertionError)):
        shake_hands(made, "localhost", client=None, ask=True)
    # A server's certificate is none of a client, though the same authority signed it.
    (tmp_path / "client.pem").write_bytes((made / "server/server.pem").read_bytes())
    (tmp_path / "client.key").write_bytes((made / "server/server.key").read_bytes())
    with pytest.raises((ssl.SSLError, OSError, AssertionError)):
        shake_hands(made, "localhost", client=tmp_path, ask=True)


def test_an_end_certificate_signs_nothing(made: Path) -> None:
    client = made / "owners" / "bank"
    as_authority = Issued(
        (client / "client.pem").read_bytes(), (client / "client.key").read_bytes()
    )
    forged = issue(as_authority, "x", 10, ["localhost"])
    context = ssl.create_default_context(cafile=str(made / "ca.pem"))
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    chain = made.parent / "forged.pem"
    chain.write_bytes(forged.certificate + as_authority.certificate + forged.key)
    server.load_cert_chain(chain)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client_side = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    server_side = server.wrap_bio(outgoing, incoming, server_side=True)

    def shake() -> None:
        for _ in range(4):
            for side in (client_side, server_side):
                with contextlib.suppress(ssl.SSLWantReadError):
                    side.do_handshake()

    with pytest.raises(ssl.SSLCertVerificationError):
        shake()


def test_nothing_is_overwritten(made: Path, tmp_path: Path) -> None:
    before = {p: p.read_bytes() for p in made.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match="never overwritten"):
        make_keys(made, ["localhost"])
    with pytest.raises(ConfigError, match="never overwritten"):
        add_owner(made, "bank")
    make_node(tmp_path / "node")
    with pytest.raises(ConfigError, match="never overwritten"):
        make_node(tmp_path / "node")
    assert before == {p: p.read_bytes() for p in made.rglob("*") if p.is_file()}


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(keys, "_fill_owner", broken)
    with pytest.raises(ConfigError, match="No space left"):
        make_keys(tmp_path / "keys", ["localhost"], ["bank"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("hosts", "owners", "named"),
    [
        ([], [], "--host"),
        (["fed.example.org:9092"], [], "host='fed.example.org:9092'"),
        (["a b"], [], "host='a b'"),
        (["localhost"], ["../evil"], r"--owner='\.\./evil'"),
        (["localhost"], ["a", "a"], "different names"),
    ],
)
def test_what_is_no_host_or_owner_is_named(
    hosts: list[str], owners: list[str], named: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=named):
        make_keys(tmp_path / "keys", hosts, owners)
    assert list(tmp_path.iterdir()) == []


def test_a_renewed_server_keeps_names_and_authority(tmp_path: Path) -> None:
    folder = make_keys(tmp_path / "keys", ["fed.example.org"], days=20)
    assert "expires" in faults(folder)["server/server.pem"]
    old = (folder / "server/server.pem").read_bytes()
    ca = (folder / "ca.pem").read_bytes()

    hosts = renew_server(folder, days=10)

    new = (folder / "server/server.pem").read_bytes()
    assert new != old
    assert hosts_of(load_certificate(new, "")) == hosts == hosts_of(load_certificate(old, ""))
    assert (folder / "ca.pem").read_bytes() == ca
    assert shake_hands(folder, "fed.example.org", client=None, ask=False)
    assert stat.S_IMODE((folder / "server/server.key").stat().st_mode) == 0o600
    assert sorted(p.name for p in (folder / "server").iterdir()) == ["server.key", "server.pem"]


def test_no_certificate_outlives_its_authority(tmp_path: Path) -> None:
    authority = make_authority(5)
    issued = load_certificate(issue(authority, "x", 300, ["localhost"]).certificate, "")
    parent = load_certificate(authority.certificate, "")
    skew = issued.not_valid_after_utc - parent.not_valid_after_utc
    assert abs(skew.total_seconds()) <= 1


def test_show_names_what_is_wrong(made: Path, tmp_path: Path) -> None:
    assert faults(made) == {}
    assert faults(made / "owners" / "bank") == {}
    folder = make_keys(tmp_path / "keys", ["localhost"], ["bank"])
    foreign = make_keys(tmp_path / "foreign", ["localhost"])
    (folder / "owners/bank/node.key").chmod(0o644)
    (folder / "server/server.pem").write_bytes((foreign / "server/server.pem").read_bytes())
    found = faults(folder)
    assert "others can read it" in found["owners/bank/node.key"]
    assert found["server/server.pem"] == "not signed by ca.pem"
    assert "is not the key" in found["server/server.key"]
    told = CliRunner().invoke(app_cli, ["keys", "show", str(folder)])
    assert told.exit_code == 1
    assert "others can read it" in " ".join(told.stdout.split())


def test_the_commands(tmp_path: Path) -> None:
    run = CliRunner()
    folder = str(tmp_path / "keys")
    first = ["keys", "init", folder, "--host", "localhost", "--owner", "bank"]
    assert run.invoke(app_cli, first).exit_code == 0
    assert isinstance(run.invoke(app_cli, first).exception, ConfigError)
    assert run.invoke(app_cli, ["keys", "add", folder, "--owner", "hospital"]).exit_code == 0
    assert run.invoke(app_cli, ["keys", "renew", folder, "--days", "90"]).exit_code == 0
    told = run.invoke(app_cli, ["keys", "show", folder])
    assert told.exit_code == 0, told.stdout
    assert "owners/hospital/node.key" in told.stdout
    handed = run.invoke(app_cli, ["keys", "show", str(tmp_path / "keys/owners/hospital")])
    line = f"fingerprint of ca.pem (SHA-256): {fingerprint(tmp_path / 'keys')}"
    assert line in told.stdout
    assert line in handed.stdout  # what both read out to each other
