"""What a deployment's environment says of sessions: their address, certificates of both ends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from fedsplit.config import RunConfig
from fedsplit.deploy.keys import make_keys
from fedsplit.errors import ConfigError, SessionError
from fedsplit.owners.handshake import open_stream
from fedsplit.wire.authentication import SessionAuthenticator
from fedsplit.wire.messages import SessionOffer
from strategies.sessions.setup import server_tls
from strategies.sessions.transports import ADDRESS_VARIABLE, StreamTransport, announced


@pytest.mark.parametrize(
    ("host", "told"),
    [("127.0.0.1", "127.0.0.1:9"), ("fed.example.org", "fed.example.org:9"), ("::1", "[::1]:9")],
)
def test_owners_are_told_where_the_server_listens(host: str, told: str) -> None:
    assert announced(host, 9) == told


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::]"])
def test_every_interface_is_no_address(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=f"{ADDRESS_VARIABLE} must say"):
        announced(host, 9)
    monkeypatch.setenv(ADDRESS_VARIABLE, "session.example.org:443")
    assert announced(host, 9) == "session.example.org:443"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = make_keys(tmp_path / "keys", ["localhost"], ["bank"], client_certificates=True)
    for name, path in (
        ("CERT", "server/server.pem"),
        ("KEY", "server/server.key"),
        ("CA", "ca.pem"),
        ("CLIENT_CA", "ca.pem"),
    ):
        monkeypatch.setenv(f"FEDSPLIT_TLS_{name}", str(made / path))
    return made


def offer_of(transport: StreamTransport) -> SessionOffer:
    return SessionOffer(1, 2, 1, "train", "stream", "token", address=transport.address)


def knock(transport: StreamTransport, folder: Path, client: Path | None) -> None:
    """Open a stream as an owner's ClientApp does, and say nothing."""
    offer = offer_of(transport)
    node: dict[str, object] = {"session-ca": str(folder / "ca.pem")}
    if client is not None:
        node["session-certificate"] = str(client / "client.pem")
        node["session-key"] = str(client / "client.key")
    open_stream(offer, RunConfig(), node).close()


@pytest.fixture
def transport(folder: Path) -> StreamTransport:
    tls, ca = server_tls()
    assert ca == (folder / "ca.pem").read_bytes()
    return StreamTransport(
        SessionAuthenticator(1),
        host="127.0.0.1",
        port=0,
        tls=tls,
        max_frame_bytes=1 << 20,
        on_bytes=None,
    )


def within(seconds: float, call: Callable[[], None]) -> BaseException | None:
    """Run ``call`` in a thread; return what it raised, or None."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return raised[0] if raised else TimeoutError() if thread.is_alive() else None


def test_mutual_tls_lets_in_whom_the_authority_vouches_for(
    transport: StreamTransport, folder: Path, tmp_path: Path
) -> None:
    foreign = make_keys(tmp_path / "foreign", ["localhost"], ["bank"], client_certificates=True)
    try:
        assert within(20, lambda: knock(transport, folder, folder / "owners/bank")) is None
        # Refused while shaking hands: the owner's side finds no connection, and goes on trying.
        for client in (None, foreign / "owners/bank"):
            error = within(1, lambda client=client: knock(transport, folder, client))  # type: ignore[misc]
            assert isinstance(error, SessionError | TimeoutError)
    finally:
        transport.close()


def test_a_client_certificate_without_its_key_is_named(
    transport: StreamTransport, folder: Path
) -> None:
    offer = offer_of(transport)
    node: dict[str, object] = {"session-certificate": str(folder / "owners/bank/client.pem")}
    with pytest.raises(ConfigError, match="session-certificate and session-key"):
        open_stream(offer, RunConfig(), node)
    transport.close()
