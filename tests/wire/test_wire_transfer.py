"""Bundles in slices: whole again at the other end, or refused."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import pytest

from fedsplit.errors import DeadlineError, FrameError, SessionError
from fedsplit.wire.frames import Kind
from fedsplit.wire.link import loopback
from fedsplit.wire.transfer import MAX_FILES, receive_files, send_files

SLICE = 64


def carry(files: Mapping[str, bytes]) -> dict[str, bytes]:
    sender, receiver = loopback(1 << 16, depth=2)
    thread = threading.Thread(target=send_files, args=(sender, files, SLICE), daemon=True)
    thread.start()
    found = receive_files(receiver, 5.0)
    thread.join(60)
    assert receiver.incoming.empty()
    return found


def receive(*slices: tuple[str, int, int, bool, bytes], **bounds: int) -> dict[str, bytes]:
    sender, receiver = loopback(1 << 16)
    for name, offset, size, last, body in slices:
        header = {"name": name, "offset": offset, "size": size, "last": last}
        sender.send(Kind.FILE, header, body)
    return receive_files(receiver, 0.1, **bounds)


@pytest.mark.parametrize(
    "sizes",
    [
        [0],
        [1],
        [SLICE - 1],
        [SLICE],
        [SLICE + 1],
        [3 * SLICE],
        [0, 0, 0],
        [0, SLICE, 5],
        [2 * SLICE, 0],
        [1] * MAX_FILES,
    ],
)
def test_round_trip(sizes: list[int]):
    files = {f"f{i:02}.bin": bytes([i + 1]) * size for i, size in enumerate(sizes)}

    assert carry(files) == files


@pytest.mark.parametrize("count", [0, MAX_FILES + 1])
def test_a_bundle_that_would_not_arrive_is_not_sent(count: int):
    sender, receiver = loopback(1 << 16)

    with pytest.raises(FrameError, match=f"bundle of {count} files"):
        send_files(sender, {f"f{i}": b"x" for i in range(count)})

    assert receiver.incoming.empty()


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        ([("a", 1, 4, False, b"xx")], "offset 1: must be 0"),
        ([("a", -1, 4, False, b"xx")], "offset -1: must be 0"),
        ([("a", 0, 4, False, b"xx"), ("a", 0, 4, True, b"xx")], "offset 0: must be 2"),
        ([("a", 0, 4, False, b"xx"), ("a", 3, 4, True, b"x")], "offset 3: must be 2"),
        ([("a", 0, 1, True, b"xx")], "longer than the announced 1"),
        ([("a", 0, 4, False, b"xx"), ("a", 2, 4, True, b"xxx")], "longer than the announced 4"),
        ([("a", 0, 4, False, b"xx"), ("a", 2, 5, True, b"xxx")], "longer than the announced 4"),
        ([("a", 0, 4, True, b"xx")], "ends before the announced 4"),
        ([("a", 0, 4, False, b"xx"), ("b", 0, 0, True, b"")], "'a': ends before"),
        ([("a", 0, -1, True, b"")], "refused"),
        ([("a", 0, 4, False, b""), ("a", 0, 4, False, b"")], "something with every slice"),
        ([("a", 0, 2**60, False, b"xx")], "refused"),
        ([(f"f{i}", 0, 0, False, b"") for i in range(MAX_FILES + 1)], "refused"),
    ],
)
def test_bad_slices_are_refused(slices: list[tuple[str, int, int, bool, bytes]], message: str):
    with pytest.raises(FrameError, match=message):
        receive(*slices)


def test_bound_counts_all_files_and_what_they_announce():
    slices = [("a", 0, 3, False, b"xxx"), ("b", 0, 3, True, b"xxx")]

    assert receive(*slices, max_bytes=6) == {"a": b"xxx", "b": b"xxx"}
    with pytest.raises(FrameError, match="over 5 bytes"):
        receive(*slices, max_bytes=5)


def test_a_sender_that_stops_or_gives_up():
    with pytest.raises(DeadlineError):
        receive(("a", 0, 4, False, b"xx"))

    sender, receiver = loopback(1 << 16)
    sender.send(Kind.FILE, {"name": "a", "offset": 0, "size": 4, "last": False}, b"xx")
    sender.close("gone")
    with pytest.raises(SessionError, match="gone"):
        receive_files(receiver, 1.0)


def test_another_frame_in_between_is_refused():
    sender, receiver = loopback(1 << 16)
    sender.send(Kind.BYE, {"reason": "x"})

    with pytest.raises(FrameError, match="BYE frame: must be FILE"):
        receive_files(receiver, 1.0)
