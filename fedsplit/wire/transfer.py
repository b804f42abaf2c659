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
        FrameError: no file, or more than ``MAX_FILES``: the receiver would wait, or refuse.
        SessionError: the link closed on the way.
    """
    if not 1 <= len(files) <= MAX_FILES:
        raise FrameError(f"bundle of {len(files)} files: must be in [1, {MAX_FILES}]")
    names = sorted(files)
    for name in names:
        data = files[name]
        for offset in range(0, max(1, len(data)), slice_bytes):
            piece = data[offset : offset + slice_bytes]
            last = name == names[-1] and offset + slice_bytes >= len(data)
            header = {"name": name, "offset": offset, "size": len(data), "last": last}
            link.send(Kind.FILE, header, piece)


def receive_files(link: Link, deadline_s: float, max_bytes: int = MAX_BYTES) -> dict[str, bytes]:
    """Receive what :func:`send_files` sent; contents are not yet verified.

    Args:
        link: the session.
        deadline_s: longest wait for one slice.
        max_bytes: bound on all files together, on what is announced as on what comes.

    Raises:
        FrameError: slices out of order, empty, longer than announced or missing at the end, or
            over the bounds.
        DeadlineError, SessionError: the peer stopped.
    """
    files: dict[str, bytearray] = {}
    sizes: dict[str, int] = {}
    while True:
        frame = link.expect(Kind.FILE, deadline_s)
        name, size, piece = frame["name"], frame["size"], frame.body
        if name not in files:
            files[name], sizes[name] = bytearray(), size
            if len(files) > MAX_FILES or size < 0 or sum(sizes.values()) > max_bytes:
                raise FrameError(f"bundle of over {max_bytes} bytes or {MAX_FILES} files: refused")
        elif not piece:  # else a peer could send nothing for ever
            raise FrameError(f"FILE {name!r}: must bring something with every slice")
        buffer = files[name]
        if frame["offset"] != len(buffer):
            raise FrameError(f"FILE offset {frame['offset']}: must be {len(buffer)}")
        if size != sizes[name] or len(buffer) + len(piece) > size:
            raise FrameError(f"FILE {name!r}: longer than the announced {sizes[name]}")
        buffer += piece
        if frame["last"]:
            short = [name for name in files if len(files[name]) != sizes[name]]
            if short:
                raise FrameError(f"FILE {short[0]!r}: ends before the announced {sizes[short[0]]}")
            # One at a time, so that the bundle is never held twice.
            return {name: bytes(files.pop(name)) for name in sorted(files)}
