"""Sending a bundle of files over a link in bounded slices, and receiving it again."""

from __future__ import annotations

from collections.abc import Mapping

from fedsplit.errors import FrameError
from fedsplit.wire.frames import Kind
from fedsplit.wire.link import Link

MAX_BYTES = 8 << 30
MAX_FILES = 16
SLICE_BYTES = 4 << 20


def send_files(link: Link, files: Mapping[str, bytes], slice_bytes: int = SLICE_BYTES) -> None:
    """Send all ``files`` as FILE frames; the very last slice says so.

    Raises:
        SessionError: the link closed on the way.
    """
    names = sorted(files)
    for name in names:
        data = files[name]
        for offset in range(0, max(1, len(data)), slice_bytes):
            piece = data[offset : offset + slice_bytes]
            last = name == names[-1] and offset + slice_bytes >= len(data)
            header = {"name": name, "offset": offset, "size": len(data), "last": last}
            link.send(Kind.FILE, header, piece)


def receive_files(link: Link, deadline_s: float) -> dict[str, bytes]:
    """Receive what :func:`send_files` sent; contents are not yet verified.

    Raises:
        FrameError: slices out of order, longer than announced, or over the bounds.
        DeadlineError, SessionError: the peer stopped.
    """
    files: dict[str, bytearray] = {}
    total = 0
    while True:
        frame = link.expect(Kind.FILE, deadline_s)
        buffer = files.setdefault(frame["name"], bytearray())
        if frame["offset"] != len(buffer):
            raise FrameError(f"FILE offset {frame['offset']}: must be {len(buffer)}")
        total += len(frame.body)
        if total > MAX_BYTES or len(files) > MAX_FILES:
            raise FrameError(f"bundle of over {MAX_BYTES} bytes or {MAX_FILES} files: refused")
        buffer += frame.body
        if len(buffer) > frame["size"]:
            raise FrameError(f"FILE {frame['name']!r}: longer than the announced {frame['size']}")
        if frame["last"]:
            return {name: bytes(data) for name, data in files.items()}
