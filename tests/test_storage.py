"""What is written is whole or absent, private from its first byte, and read within a bound."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from fedsplit import storage
from tests.disks import small_files

ROOT = Path(__file__).parents[1]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("concurrent", [False, True])
def test_a_failed_write_leaves_what_was_there(tmp_path: Path, concurrent: bool) -> None:
    path = tmp_path / "file"
    storage.write(path, "before")
    with small_files(1000), pytest.raises(OSError, match="too large"):
        storage.write(path, b"x" * 2000, concurrent=concurrent)
    with suppress(ZeroDivisionError), storage.replacing(path, concurrent=concurrent) as draft:
        draft.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_writer_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    storage.write(path, "before")
    code = (
        "import os, sys; from pathlib import Path; from fedsplit import storage\n"
        f"with storage.replacing(Path({str(path)!r})) as draft:\n"
        "    draft.write_text('half'); os._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60)
    assert done.returncode == 9
    assert path.read_text() == "before"
    storage.write(path, "after")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["after"]  # its draft is gone too


def test_permissions_hold_from_the_first_byte(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        with storage.replacing(tmp_path / "a", mode=0o600) as draft:
            assert mode(draft) == 0o600
            draft.write_text("a")
        storage.create(tmp_path / "b", b"b")
    finally:
        os.umask(old)
    assert mode(tmp_path / "a") == mode(tmp_path / "b") == 0o600
    os.umask(0o077)
    try:
        storage.write(tmp_path / "c", "c", mode=0o644)
        storage.create(tmp_path / "d", b"d", 0o700)
    finally:
        os.umask(old)
    assert (mode(tmp_path / "c"), mode(tmp_path / "d")) == (0o644, 0o700)


def test_the_file_before_is_kept_where_asked(tmp_path: Path) -> None:
    path, previous = tmp_path / "file", tmp_path / "previous"
    for text in ("1", "2", "3"):
        with storage.replacing(path, previous=previous) as draft:
            draft.write_text(text)
    assert (path.read_text(), previous.read_text()) == ("3", "2")


def test_one_of_many_creates_a_file(tmp_path: Path) -> None:
    won: list[int] = []

    def create(number: int) -> None:
        try:
            storage.create(tmp_path / "file", str(number).encode() * 1000)
            won.append(number)
        except FileExistsError:
            pass

    threads = [threading.Thread(target=create, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert (tmp_path / "file").read_text() == str(won[0]) * 1000
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with suppress(ZeroDivisionError), storage.new_folder(folder) as draft:
        (draft / "a").write_text("a")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with storage.new_folder(folder, durable=True) as draft:
        assert not folder.exists()
        (draft / "in").mkdir()
        (draft / "in/a").write_text("a")
    assert (folder / "in/a").read_text() == "a"
    assert mode(folder) == 0o700
    with pytest.raises(OSError, match="not empty"), storage.new_folder(folder, concurrent=True):
        pass
    assert list(tmp_path.iterdir()) == [folder]


def test_reading_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert storage.read_bounded(path, 5) == b"12345"
    with pytest.raises(storage.FileTooLarge, match="5 bytes: must be <= 4"):
        storage.read_bounded(path, 4)
    with pytest.raises(storage.FileTooLarge, match="11 bytes: must be <= 10"):
        storage.read_bounded(Path("/dev/zero"), 10)  # says that it holds nothing


def test_a_lock_excludes_and_can_be_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with storage.FileLock(path):
        assert mode(path) == 0o600
        began = time.monotonic()
        with pytest.raises(BlockingIOError, match="locked"):
            storage.FileLock(path, 0.1).acquire()
        assert 0.1 <= time.monotonic() - began < 5
        waiting = storage.FileLock(path)
        thread = threading.Thread(target=waiting.acquire)
        thread.start()
        path.unlink()  # its holder may: the one who waits must not end up with the deleted file
    thread.join(10)
    assert not thread.is_alive()
    with pytest.raises(BlockingIOError):
        storage.FileLock(path, 0).acquire()
    waiting.release()
    waiting.release()
    with storage.FileLock(path, 0):
        pass
