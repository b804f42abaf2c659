"""The stream between good peers: a real server on loopback, TLS, addresses, large frames."""

from __future__ import annotations

import pytest

from fedsplit.errors import ConfigError, SessionError
from fedsplit.wire.authentication import SessionAuthenticator
from fedsplit.wire.frames import Kind
from fedsplit.wire.stream import ServerTls, SessionServer, connect, is_loopback
from tests.wire.stream_peers import MAX_FRAME, RUN, Echo, grad, serving, talk
from tests.wire.wire_certificates import Authority

pytestmark = pytest.mark.usefixtures("no_thread_leak")


@pytest.mark.parametrize("secure", [False, True], ids=["plaintext", "tls"])
def test_there_and_back(secure: bool, authority: Authority):
    with serving(authority.server() if secure else None) as echo:
        link = echo.open(ca=authority.pem if secure else None)
        talk(link, 20)
        talk_size = MAX_FRAME - 1000
        body = bytes(talk_size)
        link.send(Kind.GRAD, grad(0), body)
        assert bytes(link.recv(20.0).body) == body
        link.close()

        owner, error = echo.ended.get(timeout=60)

    assert (owner, str(error)) == ("owner", "session closed: peer closed the stream")


def test_mutual_tls(authority: Authority):
    tls = authority.server()
    certificate, key = authority.issue("owner")
    with serving(ServerTls(tls.certificate, tls.key, authority.pem)) as echo:
        link = echo.open(ca=authority.pem, certificate=certificate, key=key)
        talk(link, 1)
        link.close()

        with pytest.raises(SessionError):
            connect(echo.address, ca=authority.pem, timeout_s=1.0).recv(5.0)


@pytest.mark.parametrize("case", ["authority", "name", "expired", "garbage", "plaintext server"])
def test_owner_trusts_no_other_certificate(case: str, authority: Authority):
    ca = authority.pem
    tls: ServerTls | None = authority.server()
    if case == "authority":
        ca = Authority("right authority").pem
    elif case == "name":
        tls = authority.server("other.example")
    elif case == "expired":
        tls = authority.server(expired=True)
    elif case == "garbage":
        ca = b"no certificate"
    else:
        tls = None
    with serving(tls) as echo:
        with pytest.raises(SessionError, match="not one this owner trusts"):
            echo.open(ca=ca, timeout_s=0.7)

        assert echo.sessions() == 0


def test_server_name_outranks_the_address(authority: Authority):
    with serving(authority.server("server.example")) as echo:
        link = echo.open(ca=authority.pem, server_name="server.example")
        talk(link, 1)
        link.close()


def test_nobody_listens():
    with serving() as echo:
        address = echo.address

    with pytest.raises(SessionError, match=r"within 0\.5 s: unreachable"):
        connect(address, ca=None, timeout_s=0.5)


def test_port_in_use():
    with serving() as echo, pytest.raises(SessionError, match="cannot listen"):
        Echo(port=echo.server.port)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "10.0.0.1", "example.org", "", "127.0.0.1.example.org"]
)
def test_plaintext_stays_on_loopback(host: str):
    assert not is_loopback(host)
    with pytest.raises(ConfigError, match="loopback"):
        SessionServer(SessionAuthenticator(RUN), lambda link, who: None, host=host)
    with pytest.raises(ConfigError):
        connect(f"{host}:5000", ca=None)


@pytest.mark.parametrize(
    "address",
    [
        "::1:5000",  # to gRPC the other machine [::1:5000]
        "unix:/tmp/socket",
        "unix:localhost:5000",
        "dns:///localhost:5000",
        "ipv4:127.0.0.1:5000",
        "127.0.0.1:5000,10.0.0.1:5000",
        "127.0.0.1",
        "127.0.0.1:",
        "localhost:80/x:5000",
        "localhost:5000\n",
        "",
    ],
)
@pytest.mark.parametrize("ca", [None, b"x"])
def test_addresses_mean_to_grpc_what_they_mean_here(address: str, ca: bytes | None):
    with pytest.raises(ConfigError, match="must be host:port"):
        connect(address, ca=ca)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1.2.3", "::1", "[::1]"])
def test_loopback_names(host: str):
    assert is_loopback(host)


def test_ipv6_loopback():
    try:
        echo = Echo(host="::1")
    except SessionError:
        pytest.skip("no IPv6 here")
    try:
        echo.address = f"[::1]:{echo.server.port}"
        link = echo.open()
        talk(link, 1)
        link.close()
    finally:
        echo.server.stop()


def test_plaintext_does_not_go_through_a_proxy(monkeypatch: pytest.MonkeyPatch):
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    with serving() as echo:
        link = echo.open(timeout_s=5.0)
        talk(link, 1)
        link.close()


def test_frames_of_megabytes_arrive_whole():
    with serving(max_frame_bytes=8 << 20) as echo:
        link = echo.open(max_frame_bytes=8 << 20)
        talk(link, 4, 2 << 20)
        link.close()
