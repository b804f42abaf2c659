"""The stream and peers that lie, flood, say nothing or vanish, and what is left afterwards."""

from __future__ import annotations

import logging
import queue
import threading
import time

import pytest

from fedsplit.errors import FrameError, SessionError
from fedsplit.wire.authentication import Hello
from fedsplit.wire.frames import Frame, Kind, decode, encode
from fedsplit.wire.link import Link
from fedsplit.wire.stream import connect
from tests.wire.stream_peers import (
    MAX_FRAME,
    RUN,
    Echo,
    bare_stream,
    eventually,
    grad,
    hello,
    serving,
    talk,
)

pytestmark = pytest.mark.usefixtures("no_thread_leak")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "already used"),
        ({"node": 2}, "must be one issued"),
        ({"token": "a.1.b"}, "must be one issued"),
        ({"version": "0.0.1"}, "must match"),
        ({"mode": "x"}, "must be one of"),
    ],
    ids=["replayed", "foreign", "malformed", "version", "mode"],
)
def test_refused_hello_is_told_why(changes: dict[str, object], message: str):
    with serving() as echo:
        token = echo.book.issue(RUN, 1, 1, "train")
        if not changes:
            echo.book.redeem(token, RUN, 1, 1, "train")
        link = connect(echo.address, ca=None)
        link.send(Kind.HELLO, hello(token, **changes))

        with pytest.raises(SessionError, match=message):
            link.recv(5.0)

        link.close()
        assert not echo.links
        assert eventually(lambda: echo.sessions() == 0)


def test_another_frame_first_is_refused():
    with serving() as echo:
        link = connect(echo.address, ca=None)
        link.send(Kind.BYE, {"reason": "x"})

        with pytest.raises(SessionError, match="BYE frame: must be HELLO"):
            link.recv(5.0)
        link.close()
        assert not echo.links


@pytest.mark.parametrize("data", [b"", b"GET / HTTP/1.1\r\n\r\n", bytes(1000), b"FSP1" * 1000])
def test_garbage_first_is_refused(data: bytes):
    with serving() as echo, bare_stream(echo) as (_, call, sending):
        sending.put(data)

        reply = next(call)

        assert b"FrameError" in reply
        assert list(call) == []
        assert not echo.links


def test_a_stranger_cannot_make_the_server_hold_much():
    """Before its HELLO is admitted, a peer's frames are bounded far below a session's."""
    with serving(max_frame_bytes=64 << 20) as echo, bare_stream(echo) as (_, call, sending):
        big = encode(Frame(Kind.START, {"window": 1}, bytes(1 << 20)), 0, 64 << 20)
        sending.put(big)

        assert b"must be <= 65536" in next(call)
        assert list(call) == []


def test_a_stranger_that_floods_is_held_back():
    with serving(hello_deadline_s=1.0) as echo:
        gate = threading.Event()
        admit = echo.server._authenticator.admit
        echo.server._authenticator.admit = lambda frame: gate.wait(5) and admit(frame)
        with bare_stream(echo) as (_, call, sending):
            header = hello(echo.book.issue(RUN, 1, 1, "train"))
            sending.put(encode(Frame(Kind.HELLO, header), 0, MAX_FRAME))
            for sequence in range(1, 200):
                frame = Frame(Kind.GRAD, grad(0), bytes(10_000))
                sending.put(encode(frame, sequence, MAX_FRAME))
            assert eventually(lambda: echo.sessions() == 1)
            time.sleep(0.3)
            held = [link.incoming.held for link in echo.server._links]
            gate.set()
            for _ in range(199):
                next(call)

        assert max(held) <= 1 << 16


def test_a_peer_that_says_nothing():
    with serving(hello_deadline_s=0.3) as echo:
        link = connect(echo.address, ca=None)
        start = time.monotonic()
        with bare_stream(echo) as (_, call, _sending):
            with pytest.raises(SessionError, match=r"DeadlineError: no frame within 0\.3 s"):
                link.recv(5.0)
            assert time.monotonic() - start < 4.0
            link.close()
            assert b"DeadlineError" in next(call)
            assert eventually(lambda: echo.sessions() == 0)


def test_frame_over_the_bound_ends_its_own_session_only():
    with serving() as echo:
        good = echo.open("good", 1)
        bad = echo.open("bad", 2, max_frame_bytes=16 << 20)
        talk(bad, 1)
        bad.send(Kind.GRAD, grad(1), bytes(2 * MAX_FRAME))

        with pytest.raises(SessionError):
            bad.recv(5.0)
        assert echo.ended.get(timeout=60)[0] == "bad"
        talk(good, 5)
        good.close()
        bad.close()


def test_server_frame_over_the_owners_bound():
    with serving(max_frame_bytes=4 << 20) as echo:
        link = echo.open(max_frame_bytes=4 << 20)
        small = echo.open(node=2, max_frame_bytes=1 << 16)
        assert eventually(lambda: len(echo.links) == 2)
        echo.links[1].send(Kind.START, {"window": 1}, bytes(1 << 20))

        with pytest.raises(SessionError, match="larger than max"):
            small.recv(5.0)

        talk(link, 1)
        link.close()
        small.close()


def test_malformed_frame_in_a_session_ends_it():
    with serving() as echo:
        link = echo.open()
        talk(link, 1)
        link.outgoing.put_nowait(b"FSP1 not a frame")

        with pytest.raises(SessionError, match="peer gave up: FrameError"):
            link.recv(5.0)

        assert isinstance(echo.ended.get(timeout=60)[1], FrameError)
        link.close()


def test_an_owner_that_disappears():
    with serving() as echo:
        link = echo.open()
        talk(link, 1)
        start = time.monotonic()

        link._channel.close()

        owner, error = echo.ended.get(timeout=60)
        assert owner == "owner"
        assert "session closed" in str(error)
        assert time.monotonic() - start < 3.0
        with pytest.raises(SessionError):
            link.recv(5.0)
        link.close()


@pytest.mark.parametrize("flooded", [False, True])
def test_owners_last_error_arrives(flooded: bool):
    """Also when the server's own frames fill the owner's incoming at that moment."""
    with serving() as echo:
        link = echo.open()
        talk(link, 1)
        if flooded:
            server = echo.links[0]
            for _ in range(80):
                server.send(Kind.START, {"window": 1}, b"x" * 10)
            assert eventually(lambda: link.incoming.held > 0)

        link.fail(ValueError("my own data are broken"))

        assert "my own data are broken" in str(echo.ended.get(timeout=60)[1])


@pytest.mark.parametrize("owner", ["open", "silent", "not reading"])
def test_server_stop_with_open_sessions(owner: str):
    echo = Echo()
    link = echo.open() if owner != "silent" else connect(echo.address, ca=None)
    if owner == "open":
        talk(link, 1)
    elif owner == "not reading":
        link.incoming.close("reads no more")
        assert eventually(lambda: len(echo.links) == 1)
        echo.links[0].send(Kind.START, {"window": 1}, bytes(1000))
    assert eventually(lambda: echo.sessions() == 1)
    start = time.monotonic()

    echo.server.stop()

    assert time.monotonic() - start < 5.0
    assert eventually(lambda: echo.sessions() == 0, 1.0)
    if owner == "open":
        with pytest.raises(SessionError, match="session closed"):
            link.recv(5.0)
    link.close()


def test_a_peer_that_does_not_read_is_cut_off():
    """Closing one link frees its threads and frames, without the peer's cooperation."""
    with serving() as echo, bare_stream(echo) as (_channel, _call, sending):
        header = hello(echo.book.issue(RUN, 1, 1, "train"))
        sending.put(encode(Frame(Kind.HELLO, header), 0, MAX_FRAME))
        assert eventually(lambda: len(echo.links) == 1)
        server = echo.links[0]
        end = time.monotonic() + 1.0
        while time.monotonic() < end:  # until gRPC's windows and then the outgoing are full
            server.outgoing.put(bytes(500_000), 0.05)
        assert server.outgoing.held <= MAX_FRAME
        start = time.monotonic()

        server.close("given up")

        assert eventually(lambda: echo.sessions() == 0)
        assert time.monotonic() - start < 5.0


def test_a_peer_that_only_sends_is_held_back():
    with serving() as echo:
        echo._serve = lambda link, who: None  # a server that is busy elsewhere
        link = echo.open()
        sent = 0
        while sent < 400 and link.outgoing.put(
            encode(Frame(Kind.GRAD, grad(sent), bytes(500_000)), sent + 1, MAX_FRAME), 0.5
        ):
            sent += 1

        assert sent < 400
        assert echo.links[0].incoming.held <= MAX_FRAME
        assert link.outgoing.held <= MAX_FRAME
        link.close()


def test_too_many_sessions_are_refused_at_once():
    with serving(max_sessions=2) as echo:
        links = [echo.open(node=node) for node in (1, 2)]
        for link in links:
            talk(link, 1)

        third = echo.open(node=3)
        with pytest.raises(SessionError, match="sessions at once: must be <= 2"):
            third.recv(3.0)
        third.close()
        links[0].close()

        assert eventually(lambda: echo.sessions() == 1)
        fourth = echo.open(node=4)
        talk(fourth, 1)
        for link in (fourth, links[1]):
            link.close()


def test_twenty_sessions_and_three_abusive_ones(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.CRITICAL)
    done: queue.Queue[str] = queue.Queue()
    with serving(hello_deadline_s=20.0) as echo:

        def work(i: int) -> None:
            link = echo.open(f"owner-{i}", i)
            talk(link, 20, 20_000)
            link.close()
            done.put(f"owner-{i}")

        with bare_stream(echo) as (_, _call, flood), bare_stream(echo) as (_, _silent, _nothing):
            token = echo.book.issue(RUN, 99, 1, "train")
            flood.put(encode(Frame(Kind.HELLO, hello(token, node=99)), 0, MAX_FRAME))
            for sequence in range(1, 200):  # sends, and never reads what is echoed
                flood.put(encode(Frame(Kind.GRAD, grad(0), bytes(50_000)), sequence, MAX_FRAME))
            garbage = connect(echo.address, ca=None)
            garbage.outgoing.put_nowait(b"garbage")
            threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(20)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(30)
            garbage.close()

        assert sorted(done.queue) == sorted(f"owner-{i}" for i in range(20))
        assert eventually(lambda: echo.sessions() == 0)


def test_bytes_are_recorded_from_the_first_admitted_frame_on():
    kept: list[tuple[int, str, bytes]] = []
    with serving(on_bytes=lambda *row: kept.append(row)) as echo:
        link = echo.open(node=5)
        link.send(Kind.GRAD, grad(0), b"body")
        link.recv(5.0)
        link.close()

    assert {(node, mode) for node, mode, _ in kept} == {(5, "train")}
    assert kept[0][2].endswith(b"body")
    assert all(decode(raw, 1 << 20).kind is not Kind.HELLO for _, _, raw in kept)


def test_a_failing_handler_costs_only_its_session(caplog: pytest.LogCaptureFixture):
    with serving() as echo:
        start = echo._start

        def handler(link: Link, who: Hello) -> None:
            if who.owner == "unlucky":
                raise SessionError("no round is under way")
            start(link, who)

        echo.server._on_session = handler
        unlucky = echo.open("unlucky", 1)
        with pytest.raises(SessionError):
            unlucky.recv(5.0)
        lucky = echo.open("lucky", 2)
        talk(lucky, 2)
        for link in (unlucky, lucky):
            link.close()


def test_links_are_closed_by_many_threads_at_once():
    with serving() as echo:
        link = echo.open()
        talk(link, 1)

        threads = [threading.Thread(target=link.close) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)

        assert link.closed
        assert eventually(lambda: echo.sessions() == 0)


def test_a_closed_session_leaves_nothing_in_memory():
    import gc
    import weakref

    with serving() as echo:
        link = echo.open()
        talk(link, 1)
        link.close()
        refs = [weakref.ref(link), weakref.ref(echo.links[0])]
        echo.ended.get(timeout=60)
        echo.links.clear()
        del link

        def gone() -> bool:
            gc.collect()
            return all(ref() is None for ref in refs)

        assert eventually(gone)
