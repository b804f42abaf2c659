"""Files that are whole or absent: write-then-rename, syncing, private files, locks, bounded reads.

Everything that must outlive a crash goes through here.  POSIX semantics are assumed: a rename
within a folder is atomic, and data is on the disk once ``fsync`` of the file and of its folder
have returned.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

PRIVATE = 0o600  # mode of a file that its owner alone may read
PRIVATE_FOLDER = 0o700
# Blanks at the end of a JSON file, for what must be told of a run even if the disk is full then.
ROOM = b" " * 4096 + b"\n"


class FileTooLarge(OSError):
    """A file holds more bytes than its reader allows."""

    def __init__(self, path: Path, size: int, most: int) -> None:
        super().__init__(errno.EFBIG, f"{size} bytes: must be <= {most}", str(path))


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk.

    Raises:
        OSError: the disk reports that it is not.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _draft_of(path: Path, concurrent: bool) -> Path:
    # One fixed name, so that what a crash leaves behind is overwritten and never piles up.
    tag = f".{os.urandom(8).hex()}" if concurrent else ""
    return path.with_name(f".{path.name}{tag}.draft")


@contextmanager
def replacing(
    path: Path,
    *,
    mode: int | None = None,
    durable: bool = True,
    concurrent: bool = False,
    previous: Path | None = None,
) -> Iterator[Path]:
    """Yield a draft's path; what the block writes there takes the place of ``path`` in one step.

    When anything fails, ``path`` is as it was and the draft is removed.

    Args:
        path: the file; its folder must exist.
        mode: exact permissions, which the draft has from its first byte; None = as the umask says.
        durable: whether content and name are on the disk when the block ends; without it a power
            cut may lose the file, though no crash of the process does.
        concurrent: whether several writers may be at work on this path at once; the last one wins.
        previous: where the file that was there moves to.

    Raises:
        OSError: the file cannot be written.
    """
    draft = _draft_of(path, concurrent)
    try:
        if mode is not None:
            draft.unlink(missing_ok=True)
            os.close(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
            os.chmod(draft, mode)
        yield draft
        if mode is not None:
            os.chmod(draft, mode)  # a library may have written another file under this name
        if durable:
            sync(draft)
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(draft, path)
        if durable:
            sync(path.parent)
    finally:
        with suppress(OSError):
            draft.unlink()


def write(
    path: Path,
    content: bytes | str,
    *,
    mode: int | None = None,
    durable: bool = True,
    concurrent: bool = False,
) -> None:
    """Write a whole file (text as UTF-8) in one step; see :func:`replacing`.

    Raises:
        OSError: it cannot be written; the file that was there is intact.
    """
    with replacing(path, mode=mode, durable=durable, concurrent=concurrent) as draft:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    durable: bool = True,
    previous: Path | None = None,
) -> None:
    """Write tensors of any shape and device as a safetensors file; see :func:`replacing`.

    Raises:
        OSError: it cannot be written; the file that was there is intact.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    own = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    with replacing(path, durable=durable, previous=previous) as draft:
        try:
            save_file(own, draft, metadata=None if metadata is None else dict(metadata))
        except SafetensorError as error:  # what safetensors makes of a full disk
            raise OSError(errno.EIO, str(error), str(path)) from error


def create(path: Path, content: bytes, mode: int = PRIVATE) -> None:
    """Create a file whole, on the disk, with exactly ``mode`` from its first byte on.

    Of several processes that create it at once, one succeeds.

    Raises:
        FileExistsError: it is there already, and is left as it is.
        OSError: it cannot be written.
    """
    draft = _draft_of(path, concurrent=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.link(draft, path)  # atomic, and fails where the path exists
    finally:
        draft.unlink()
    sync(path.parent)


def append(path: Path, content: bytes) -> None:
    """Add ``content`` to the end of a file, made where it is missing; it is on the disk then.

    Raises:
        OSError: it cannot be written; part of it may be in the file.
    """
    with path.open("ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def new_folder(
    folder: Path, *, mode: int = PRIVATE_FOLDER, durable: bool = False, concurrent: bool = False
) -> Iterator[Path]:
    """Yield a draft folder; with all that the block puts there it becomes ``folder`` in one step.

    When anything fails, the draft is removed.

    Args:
        folder: must be absent or empty; its parent must exist.
        mode: permissions, less the umask.
        durable: whether every folder's names are on the disk when the block ends; the block itself
            syncs its files.
        concurrent: whether several processes may make this folder at once; the first one wins.

    Raises:
        OSError: it cannot be made, or ``folder`` holds something by the end of the block.
    """
    draft = _draft_of(folder, concurrent)
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(mode=mode)
    try:
        yield draft
        if durable:
            for inner in [draft, *(p for p in draft.rglob("*") if p.is_dir())]:
                sync(inner)
        draft.rename(folder)
        if durable:
            sync(folder.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def read_bounded(path: Path, most: int) -> bytes:
    """Return a file's content, of which no more than ``most`` bytes are ever held.

    Raises:
        FileTooLarge: it is larger (an OSError whose ``strerror`` tells both numbers).
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        content = b"" if size > most else file.read(most + 1)
    if max(size, len(content)) > most:
        raise FileTooLarge(path, max(size, len(content)), most)
    return content


class FileLock:
    """Exclusive lock between threads and processes; a process that ends lets it go.

    Args:
        path: the lock file, made with mode 0600 where it is missing; whoever holds the lock may
            delete it.
        wait_s: seconds to wait for it; None = as long as it takes.
    """

    def __init__(self, path: Path, wait_s: float | None = None) -> None:
        self.path = path
        self._wait_s = wait_s
        self._held = -1

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            BlockingIOError: another holds it, and the time is up.
            OSError: the lock file cannot be opened.
        """
        until = None if self._wait_s is None else time.monotonic() + self._wait_s
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, PRIVATE)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if until is None else fcntl.LOCK_NB))
                # The one before may have deleted the file: a lock on it would exclude nobody.
                if os.fstat(descriptor).st_ino == os.stat(self.path).st_ino:
                    self._held = descriptor
                    return
            except (BlockingIOError, FileNotFoundError):
                pass
            finally:
                if self._held != descriptor:
                    os.close(descriptor)
            if until is not None and time.monotonic() >= until:
                raise BlockingIOError(errno.EWOULDBLOCK, "is locked by another", str(self.path))
            time.sleep(0.0 if until is None else min(0.2, max(0.0, until - time.monotonic())))

    def release(self) -> None:
        """Let the lock go; harmless when it is not held."""
        if self._held >= 0:
            os.close(self._held)
            self._held = -1

    def __enter__(self) -> FileLock:
        self.acquire()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


@contextmanager
def working_in(folder: Path, wait_s: float | None = None) -> Iterator[None]:
    """Hold ``folder`` against every other process and thread that works in it.

    No lock file is left behind; one that a killed process left holds nobody up.

    Args:
        folder: must exist.
        wait_s: see :class:`FileLock`.

    Raises:
        BlockingIOError: another works in it, and the time is up.
        OSError: the lock file cannot be made.
    """
    with FileLock(folder / ".lock", wait_s) as lock:
        try:
            yield
        finally:
            with suppress(OSError):
                lock.path.unlink()


def set_in_place(path: Path, **values: Any) -> None:
    """Set top-level values of a JSON object's file where it lies, for which a full disk has room.

    The file must end in :data:`ROOM`.  Not in one step: a crash meanwhile damages the file.

    Args:
        path: the file.
        values: those to set; texts are cut to 500 characters.

    Raises:
        ValueError: the file holds no JSON object, or not enough room.
        OSError: it cannot be read or written.
    """
    short = {key: v[:500] if isinstance(v, str) else v for key, v in values.items()}
    document = {**json.loads(path.read_bytes()), **short}
    content = json.dumps(document, ensure_ascii=False).encode("utf-8", "replace")
    with path.open("r+b") as file:
        size = os.fstat(file.fileno()).st_size
        if len(content) > size:
            raise ValueError(f"{path}: {len(content)} bytes: must be <= {size}")
        file.write(content.ljust(size))
        file.flush()
        os.fsync(file.fileno())
