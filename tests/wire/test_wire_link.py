"""Links: order, deadlines, closing, and holding back a peer that sends too much."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest

from fedsplit.errors import DeadlineError, FrameError, SessionError
from fedsplit.wire.frames import Frame, Kind, decode, encode
from fedsplit.wire.link import FrameQueue, Link, loopback

BOUND = 1 << 16


def bye(reason: str = "x") -> tuple[Kind, dict[str, str]]:
    return Kind.BYE, {"reason": reason}


def raw(sequence: int, reason: str = "x") -> bytes:
    return encode(Frame(Kind.BYE, {"reason": reason}), sequence, BOUND)


def in_thread(work) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_frames_arrive_in_order_and_are_counted():
    left, right = loopback(BOUND)
    seen: list[bytes] = []
    right.on_bytes = seen.append

    for i in range(5):
        left.send(*bye(str(i)))
    received = [right.recv(20.0) for _ in range(5)]

    assert [(f["reason"], f.sequence) for f in received] == [(str(i), i) for i in range(5)]
    assert (left.counters, right.counters) == ((5, 0), (0, 5))
    assert left.traffic.bytes_out == right.traffic.bytes_in == sum(map(len, seen))
    assert left.traffic.frames_out == right.traffic.frames_in == 5


@pytest.mark.parametrize("sequence", [1, 2**32 - 1])
def test_frames_out_of_sequence_are_refused(sequence: int):
    link = Link(BOUND)
    link.incoming.put_nowait(raw(sequence))

    with pytest.raises(FrameError, match=f"sequence {sequence}: must be 0"):
        link.recv(20.0)


def test_repeated_frame_is_refused():
    link = Link(BOUND)
    link.incoming.put_nowait(raw(0))
    link.incoming.put_nowait(raw(0))
    link.recv(20.0)

    with pytest.raises(FrameError, match="sequence 0: must be 1"):
        link.recv(20.0)


def test_counters_move_a_session_to_another_link():
    first, second = Link(BOUND), Link(BOUND)
    first.send(*bye())
    second.counters = first.counters

    second.send(*bye())

    assert [decode(d, BOUND).sequence for d in first.drain() + second.drain()] == [0, 1]


def test_malformed_frame_surfaces_at_its_reader():
    link = Link(BOUND)
    link.incoming.put_nowait(b"not a frame")

    with pytest.raises(FrameError):
        link.recv(20.0)


@pytest.mark.parametrize("timeout_s", [0.0, 0.15, -1.0])
def test_deadline(timeout_s: float):
    link = Link(BOUND)
    start = time.monotonic()

    with pytest.raises(DeadlineError, match=f"within {timeout_s:g} s"):
        link.recv(timeout_s)

    assert max(0.0, timeout_s) <= time.monotonic() - start < 20.0
    link.incoming.put_nowait(raw(0))
    assert link.recv(0.0).kind is Kind.BYE  # a missed deadline does not end the link


def test_expect():
    link = Link(BOUND)
    link.incoming.put_nowait(raw(0))

    with pytest.raises(FrameError, match="BYE frame: must be HELLO"):
        link.expect(Kind.HELLO, 1.0)


@pytest.mark.parametrize("closer", [0, 1])
def test_close_delivers_what_is_queued(closer: int):
    links = loopback(BOUND)
    for i in range(3):
        links[0].send(*bye(str(i)))

    links[closer].close("enough")

    assert [links[1].recv(20.0)["reason"] for _ in range(3)] == ["0", "1", "2"]
    for _ in range(2):
        with pytest.raises(SessionError, match="session closed: enough"):
            links[1].recv(20.0)
    for link in links:
        with pytest.raises(SessionError, match="session closed: enough"):
            link.send(*bye())
    assert links[0].closed
    assert links[1].closed


def test_close_delivers_a_full_box():
    link = Link(BOUND, depth=2)
    link.send(*bye("0"))
    link.send(*bye("1"))

    link.close()

    assert link.take() == raw(0, "0")
    assert link.take() == raw(1, "1")
    assert link.take() is None
    assert link.take() is None


def test_close_keeps_the_first_reason():
    link = Link(BOUND)
    assert (link.closed, link.reason) == (False, "")

    link.close("first")
    link.close("second")

    assert link.reason == "first"


@pytest.mark.parametrize("waiting", ["recv", "take", "send", "put"])
def test_close_wakes_who_waits_at_once(waiting: str):
    link = Link(BOUND, depth=1)
    ended: list[object] = []

    def work() -> None:
        try:
            if waiting == "recv":
                link.recv(60.0)
            elif waiting == "take":
                ended.append(link.take())
            elif waiting == "send":
                link.send(*bye())
                link.send(*bye())
            else:
                link.put(link.incoming, b"1", None)
                link.put(link.incoming, b"2", None)
        except SessionError as error:
            ended.append(str(error))

    thread = in_thread(work)
    time.sleep(0.1)
    start = time.monotonic()
    link.close("over")
    thread.join(60)

    assert time.monotonic() - start < 1.0
    assert ended == [None if waiting == "take" else "session closed: over"]


def test_error_frame_ends_the_peers_session():
    left, right = loopback(BOUND)

    left.fail(ValueError("eta=-1: must be > 0"))

    with pytest.raises(SessionError, match="peer gave up: ValueError: eta=-1: must be > 0"):
        right.recv(20.0)
    assert left.reason == "ValueError: eta=-1: must be > 0"


class Silent(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x" * 10_000),
        ValueError("\ud800 /tmp/\udcff"),
        ValueError("\0\n" * 3000),
        ValueError("\U0001f600" * 3000),
        Silent(),
        KeyError(),
    ],
    ids=["long", "surrogates", "control", "wide", "silent", "empty"],
)
def test_fail_never_raises_and_tells_the_peer(error: Exception):
    left, right = loopback(BOUND)

    left.fail(error)

    with pytest.raises(SessionError, match=f"peer gave up: {type(error).__name__}"):
        right.recv(20.0)
    assert left.closed


def test_fail_on_a_closed_link_or_too_small_a_bound():
    closed, small = Link(BOUND), Link(10)
    closed.close("before")

    closed.fail(ValueError("late"))
    small.fail(ValueError("x"))

    assert closed.reason == "before"
    assert small.closed


@pytest.mark.parametrize("busy", [False, True])
def test_fail_does_not_wait_for_a_peer_that_does_not_read(busy: bool):
    """The server gives up on one owner while others wait for it."""
    link = Link(BOUND, depth=1)
    link.send(*bye())
    ended: list[str] = []

    def block() -> None:
        try:
            link.send(*bye())
        except SessionError as error:
            ended.append(str(error))

    thread = in_thread(block) if busy else None
    time.sleep(0.1)
    start = time.monotonic()
    link.fail(ValueError("enough"))

    assert time.monotonic() - start < 3.0
    assert link.closed
    if thread is not None:
        thread.join(60)
        assert len(ended) == 1


def test_a_peer_that_does_not_read_is_given_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fedsplit.wire.link._SEND_S", 0.1)
    link = Link(BOUND, depth=1)
    link.send(*bye())

    with pytest.raises(SessionError, match=r"peer stopped reading for 0\.1 s"):
        link.send(*bye())

    assert link.closed
    assert link.counters == (1, 0)  # the frame that did not leave is not counted


@pytest.mark.parametrize(("depth", "hold", "fits"), [(3, None, 3), (100, 1000, 3), (100, 10, 1)])
def test_backpressure(depth: int, hold: int | None, fits: int):
    """Memory is bounded in frames and in bytes; one frame always fits, or nothing would move."""
    queue = FrameQueue(depth, hold)
    done: list[bool] = []
    sender = in_thread(lambda: done.extend(queue.put(bytes(300), 5.0) for _ in range(fits + 4)))
    time.sleep(0.1)

    assert queue.held == 300 * fits
    assert len(done) == fits
    for _ in range(fits + 4):
        assert queue.get(5.0) is not None
        assert queue.held <= 300 * fits
    sender.join(60)
    assert done == [True] * (fits + 4)
    assert queue.held == 0


def test_box_without_room():
    queue = FrameQueue(1)
    queue.put_nowait(b"1")

    assert queue.put(b"2", 0.05) is False
    with pytest.raises(SessionError, match="no room"):
        queue.put_nowait(b"2")
    assert not queue.empty()
    assert queue.get(0.0) == b"1"
    assert queue.empty()


def test_widen_raises_both_bounds():
    link = Link(100, hold_bytes=100)
    with pytest.raises(FrameError):
        link.send(Kind.START, {"window": 1}, bytes(200))

    link.widen(1000)
    link.send(Kind.START, {"window": 1}, bytes(200))
    link.send(Kind.START, {"window": 1}, bytes(200))

    assert len(link.drain()) == 2


def test_many_threads_send_and_close():
    """Sequence numbers stay gapless; a frame is either delivered or its sender told."""
    for _ in range(20):
        left, right = loopback(BOUND, depth=8)
        sent: list[str] = []
        gate = threading.Barrier(6)

        def work(i: int, link: Link = left, sent: list[str] = sent, gate=gate) -> None:
            gate.wait()
            try:
                for j in range(50):
                    link.send(*bye(f"{i}.{j}"))
                    sent.append(f"{i}.{j}")
            except SessionError:
                pass

        def close(i: int, link: Link = left, gate=gate) -> None:
            gate.wait()
            time.sleep(0.002)
            link.close(f"closer {i}")

        threads = [in_thread(lambda i=i, w=w: w(i)) for i, w in enumerate([work] * 4 + [close] * 2)]
        received = []
        with contextlib.suppress(SessionError):
            while True:
                received.append(right.recv(5.0)["reason"])
        for thread in threads:
            thread.join(60)

        assert left.reason.startswith("closer")
        assert sorted(received) == sorted(sent)
        assert right.counters == (0, len(sent))


def test_many_threads_fail_at_once():
    left, right = loopback(BOUND)

    threads = [in_thread(lambda: left.fail(ValueError("x"))) for _ in range(8)]
    for thread in threads:
        thread.join(60)

    with pytest.raises(SessionError, match="peer gave up"):
        right.recv(20.0)
