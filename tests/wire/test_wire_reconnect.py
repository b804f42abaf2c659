"""A session outlives its stream: cuts cost time, never a frame, and never give one twice."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.errors import SessionError, TokenError
from fedsplit.wire.dial import METHOD, connect
from fedsplit.wire.frames import Kind
from fedsplit.wire.link import Link
from fedsplit.wire.reconnection import RECEIVED, TICKET, ReplayBuffer, SessionTickets
from simulations.faults.proxy import Proxy
from tests.wire.stream_peers import Echo, eventually, grad, hello
from tests.wire.wire_certificates import Authority

BODY = bytes(range(256)) * 40


@pytest.fixture(params=["plain", "tls"])
def echo(request: pytest.FixtureRequest) -> Iterator[Echo]:
    authority = Authority("right authority") if request.param == "tls" else None
    tls = authority.server() if authority else None
    made = Echo(tls, reconnect_s=20.0)
    made.ca = authority.pem if authority else None  # type: ignore[attr-defined]
    yield made
    made.server.stop()


def through(echo: Echo, proxy: Proxy, reconnect_s: float = 20.0) -> Link:
    token = echo.book.issue(7, 1, 1, "train")
    link = connect(
        f"127.0.0.1:{proxy.port}",
        ca=echo.ca,  # type: ignore[attr-defined]
        max_frame_bytes=1 << 20,
        reconnect_s=reconnect_s,
    )
    link.send(Kind.HELLO, hello(token))
    return link


def exchange(link: Link, step: int) -> None:
    link.send(Kind.GRAD, grad(step), BODY)
    frame = link.expect(Kind.LOGITS, 20.0)
    assert frame["step"] == step
    assert bytes(frame.body) == BODY


def test_cuts_lose_and_repeat_nothing(echo: Echo) -> None:
    with Proxy(echo.server.port) as proxy:
        link = through(echo, proxy)
        for step in range(12):
            exchange(link, step)
            if step % 4 == 1:
                proxy.cut(0.3)
        assert proxy.connections > 3, "every cut should have cost a connection"
        assert len(echo.links) == 1, "it should be one session to the server"
        link.close()
        assert echo.ended.get(timeout=60)[0] == "owner"
        assert eventually(lambda: not echo.sessions())


def test_a_cut_in_the_middle_of_a_frame(echo: Echo) -> None:
    with Proxy(echo.server.port) as proxy:
        link = through(echo, proxy)
        exchange(link, 0)
        for step, after in enumerate((1, 700, 9000, 11_000, 20_000), start=1):
            proxy.truncate(after)  # in the question, in the answer, or behind both
            exchange(link, step)
        link.close()


def test_a_flipped_bit_never_passes_under_tls() -> None:
    authority = Authority("right authority")
    echo = Echo(authority.server(), reconnect_s=20.0)
    echo.ca = authority.pem  # type: ignore[attr-defined]
    with Proxy(echo.server.port) as proxy:
        link = through(echo, proxy)
        exchange(link, 0)
        for step in range(1, 5):
            proxy.flip(answer=step % 2 == 0)  # TLS tells the two ends with different codes
            exchange(link, step)
        assert proxy.connections > 1, "TLS should have ended the connection"
        link.close()
    echo.server.stop()


def test_a_cut_that_lasts_is_an_end(echo: Echo) -> None:
    echo.server._reconnect_s = 1.0
    with Proxy(echo.server.port) as proxy:
        link = through(echo, proxy, reconnect_s=1.0)
        exchange(link, 0)
        began = time.monotonic()
        proxy.cut(60.0)
        with pytest.raises(SessionError, match="session closed"):
            link.expect(Kind.LOGITS, 20.0)
        _, error = echo.ended.get(timeout=60)
        assert "no new stream within 1 s" in str(error)
        assert time.monotonic() - began < 15
        assert eventually(lambda: not echo.sessions())
        link.close()


def test_a_server_that_closes_is_not_called_again(echo: Echo) -> None:
    with Proxy(echo.server.port) as proxy:
        link = through(echo, proxy)
        exchange(link, 0)
        echo.links[0].fail(SessionError("enough"))
        with pytest.raises(SessionError, match="enough"):
            link.expect(Kind.LOGITS, 10.0)
        link.close()
        assert proxy.connections == 1


@pytest.mark.parametrize("ticket", ["", "x", "none.ffff", "NAME.", "NAME.ffff", "NAME.ü"])
def test_a_ticket_cannot_be_made_up(ticket: str) -> None:
    echo = Echo(reconnect_s=20.0)
    link = echo.open()
    talked = threading.Event()
    assert eventually(lambda: bool(echo.server._tickets))
    tickets = next(iter(echo.server._tickets))
    given_ticket = ticket.replace("NAME", tickets).encode("ascii", "ignore").decode() or "x"
    channel = grpc.insecure_channel(echo.address)
    call = channel.stream_stream(METHOD)(
        iter(talked.wait, True), metadata=((TICKET, given_ticket), (RECEIVED, "0"))
    )
    with pytest.raises(grpc.RpcError):
        next(call)
    talked.set()
    channel.close()
    exchange(link, 0)  # the owner whose session it is notices nothing
    link.close()
    echo.server.stop()


def test_tickets_are_single_use_but_for_an_answer_that_was_lost() -> None:
    tickets = SessionTickets(ReplayBuffer(Link(1 << 20), 3))
    first = tickets.ticket
    second = tickets.redeem(first)
    third = tickets.redeem(first)  # the answer with the second never arrived
    assert len({first, second, third}) == 3
    fourth = tickets.redeem(third)
    assert tickets.ticket == fourth
    for gone in (first, second):
        with pytest.raises(TokenError, match="the last one given"):
            tickets.redeem(gone)


def fill(replay: ReplayBuffer, stream: int, count: int) -> list[bytes]:
    """Take what is in the outgoing, without waiting for more."""
    taken = []
    for data in replay.outgoing(stream):
        taken.append(data)
        if len(taken) == count:
            break
    return taken


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=8))
def test_whatever_is_cut_the_reader_sees_every_frame_once(plan: list[tuple[int, int]]) -> None:
    """Each turn sends some frames, and loses some of those that were under way."""
    link, reader = Link(1 << 20), Link(1 << 20, depth=1 << 10)
    out, into = ReplayBuffer(link, 64), ReplayBuffer(reader, 64)
    made = 0
    stream, _ = out.attach(0)
    into.attach(0)
    for new, lost in plan:
        for _ in range(new):
            link.outgoing.put_nowait(b"%d" % made)
            made += 1
        left = made - into.arrived
        taken = fill(out, stream, left) if left else []
        into.incoming(taken[: max(0, len(taken) - lost)], into._stream)
        into.attach(0)
        stream, _ = out.attach(into.arrived)
    left = made - into.arrived
    into.incoming(fill(out, stream, left) if left else [], into._stream)
    seen = []
    while not reader.incoming.empty():
        seen.append(reader.incoming.get(0.0))
    assert seen == [b"%d" % n for n in range(made)]


def test_a_peer_that_lacks_what_is_no_longer_kept_is_told() -> None:
    link = Link(1 << 30, depth=64)
    replay = ReplayBuffer(link, 2)
    stream, _ = replay.attach(0)
    for _ in range(4):
        link.outgoing.put_nowait(bytes(5 << 20))
    assert len(fill(replay, stream, 4)) == 4
    assert replay.attach(4)[0] == stream + 1
    for received in (0, 5):
        with pytest.raises(SessionError, match="cannot go on"):
            replay.attach(received)


def silent_stream(echo: Echo, gone: threading.Event) -> tuple[grpc.Channel, grpc.Call]:
    options = [("grpc.use_local_subchannel_pool", 1)]
    channel = grpc.insecure_channel(echo.address, options=options)
    return channel, channel.stream_stream(METHOD)(iter(lambda: gone.wait() and b"", b""))


def test_silent_streams_keep_no_owner_out() -> None:
    """Many more than all that may be there at once; every owner that says HELLO gets in."""
    echo, gone = Echo(max_waiting=4, max_sessions=3), threading.Event()
    silent = [silent_stream(echo, gone) for _ in range(40)]
    assert eventually(lambda: len(echo.server._waiting) == 4)
    links = [echo.open(f"owner-{i}", node=i + 1) for i in range(3)]
    for link in links:
        exchange(link, 0)
    assert len(echo.server._waiting) <= 4
    for _, call in silent:
        call.cancel()
    gone.set()
    for channel, _ in silent:
        channel.close()
    assert eventually(lambda: not echo.server._waiting)
    for link in links:
        exchange(link, 1)
        link.close()
    echo.server.stop()


def test_the_oldest_of_the_most_crowded_address_makes_room() -> None:
    echo = Echo(max_waiting=3)
    links = [Waiting() for _ in range(5)]
    for link, host in zip(links, ("a", "b", "a", "a", "c"), strict=True):
        echo.server._make_room(link, host)  # type: ignore[arg-type]
    assert [link.told for link in links] == [1, 0, 1, 0, 0]
    assert list(echo.server._waiting.values()) == ["b", "a", "c"]
    echo.server._waiting.clear()
    echo.server.stop()


def test_256_silent_streams_from_four_addresses_leave_an_owner_its_place() -> None:
    echo = Echo(max_waiting=64)
    silent = [Silent() for _ in range(512)]
    for at, link in enumerate(silent[:256]):
        echo.server._make_room(link, f"10.0.0.{at % 4}")  # type: ignore[arg-type]
    owner = Silent()
    echo.server._make_room(owner, "192.0.2.1")  # type: ignore[arg-type]
    for at, link in enumerate(silent[256:]):
        echo.server._make_room(link, f"10.0.0.{at % 4}")  # type: ignore[arg-type]
    assert owner.closed == 0, "its address is the least crowded"
    assert owner in echo.server._waiting
    assert len(echo.server._waiting) == 64
    assert sum(link.closed for link in silent) == 512 - 63
    echo.server._waiting.clear()
    echo.server.stop()


class Silent:
    """A stream that never says anything."""

    closed = 0

    def fail(self, error: Exception) -> None:
        self.closed += 1


class Waiting:
    """A stream that has said nothing yet."""

    told = 0

    def fail(self, error: Exception) -> None:
        assert "wait for HELLO: must be <= 3" in str(error)
        self.told += 1
