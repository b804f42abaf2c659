"""The ledger: one line for each thing that leaves an owner, written before it leaves.

::

    HOME/ledger.jsonl       append-only, one JSON object per line, mode 0600
    HOME/ledger.head        number of lines, bytes and hash after the last line
    HOME/ledger.state.json  totals derived from the lines; only saves re-reading them
    HOME/ledger.torn        tails of lines that a crash cut off, moved here, never dropped
    HOME/ledger.lock        held while a line is written

Line n ends in ``"hash": SHA-256(hash of line n-1 | the line's JSON without its hash)``: a line that
is changed, removed, inserted or moved breaks the chain at its place, and lines missing at the end
are told by ``ledger.head``.  There is no key: whoever can write all of these files can write
another history.  An owner who wants to hold a record against somebody keeps a copy of the last
hash elsewhere.

Each line is written with one ``write`` to a file opened O_APPEND, and on the disk (fsync) before
what it describes leaves.  A process killed in between therefore reports what never left, and never
the other way round.  An owner whose steps are shorter than its disk's fsync may let lines without
representations (gradients, batches the server holds already) share one: they are written before
anything leaves just the same, which is all that a killed process needs, but a power cut may lose
the last of them; the line ``ready`` of their session tells how many batches there were at most.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedsplit import storage
from fedsplit.errors import LedgerError, check
from fedsplit.owners.ledger.totals import Totals

GENESIS = hashlib.sha256(b"fedsplit.ledger.v1").hexdigest()
LEDGER, HEAD, STATE, TORN, LOCK = (
    "ledger.jsonl",
    "ledger.head",
    "ledger.state.json",
    "ledger.torn",
    "ledger.lock",
)
_END = re.compile(rb',"hash":"([0-9a-f]{64})"}\Z')
_SAVE_AFTER = 256  # lines that the next process would have to read again
_MAY_WAIT = {"slots", "logit-gradients", "hidden-gradients"}
MOST_WAITING = 4096
_CHUNK = 1 << 20
# What adding up a line raises whose hash is right and whose values are no ledger's.
NO_LINE = (KeyError, TypeError, ValueError, AttributeError, OverflowError)
Entry = dict[str, Any]


@dataclass
class Cursor:
    """A place between two lines."""

    n: int = 0
    end: int = 0
    hash: str = GENESIS

    def read(self, line: bytes) -> Entry:
        """Check the line that starts here, move behind it and return it.

        Args:
            line: without its line break.

        Raises:
            LedgerError: it is not the next line of the chain.
        """
        match = _END.search(line)
        if match is None:
            raise LedgerError("is not a line of a ledger: it does not end in its hash")
        text = line[: match.start()] + b"}"
        digest = match[1].decode()
        if chained(self.hash, text) != digest:
            raise LedgerError("does not follow from the line before it: one of them was changed")
        try:
            entry: Entry = json.loads(text)
        except (ValueError, RecursionError):
            raise LedgerError("is not a line of a ledger: it is not JSON") from None
        if entry.get("n") != self.n:
            raise LedgerError(f"has number {entry.get('n')!r}: must be {self.n}")
        self.n += 1
        self.end += len(line) + 1
        self.hash = digest
        return entry


def chained(previous: str, text: bytes) -> str:
    """Return the hash of a line whose JSON, without its hash, is ``text``."""
    return hashlib.sha256(previous.encode() + text).hexdigest()


class Ledger:
    """One owner's ledger, open for writing; several processes and threads may write.

    Args:
        folder: the owner's home.
        sync_every: lines without representations that share one fsync; 1 = each has its own.
        durable: whether lines are on the disk before what they describe leaves; without it a power
            cut may lose them, though no crash of the process does.  For simulations.

    Raises:
        ConfigError: ``sync_every`` out of range.
        LedgerError: it cannot be read or written, or its chain is broken: then nothing may leave.
    """

    def __init__(self, folder: Path, *, sync_every: int = 1, durable: bool = True) -> None:
        whole = isinstance(sync_every, int) and not isinstance(sync_every, bool)
        bound = f"an integer in [1, {MOST_WAITING}] (lines)"
        check(whole and 1 <= sync_every <= MOST_WAITING, "ledger-sync", sync_every, bound)
        self.path = folder / LEDGER
        self._sync_every = sync_every
        self._durable = durable
        self._waiting = 0
        self.totals = Totals()
        self._folder = folder
        self._at = Cursor()
        self._saved = 0
        self._broken = ""
        self._mutex = threading.Lock()
        self._lock = storage.FileLock(folder / LOCK)
        self._fds: dict[str, int] = {}
        with self._held():
            self._restore()
            self._catch_up()
            self._check_head()

    def close(self) -> None:
        """Close the files; the totals are saved if many lines came since they last were."""
        with contextlib.suppress(LedgerError), self._held():
            self._sync()
            if self._at.n - self._saved >= _SAVE_AFTER and not self._broken:
                self._save()
        for fd in self._fds.values():
            os.close(fd)
        self._fds = {}

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def append(self, make: Callable[[Totals], Entry]) -> Entry:
        """Write one line and return it once it is on the disk.

        Args:
            make: totals of all lines so far -> the line's content; what it raises (a budget that is
                used up) keeps the line from being written.  No other process writes meanwhile.

        Raises:
            LedgerError: the line cannot be written; then what it describes must not leave.
        """
        with self._held():
            if self._broken:
                raise LedgerError(self._broken)
            self._catch_up()
            entry = {"time": now(), **make(self.totals)}
            self.totals.apply(entry)
            if "draw" in entry:
                entry["cumulative"] = self.totals.exposure.summary(entry["representation"])
            self._write(entry)
        return entry

    def save(self) -> None:
        """Save the totals, so that the next process need not read all lines."""
        with self._held():
            self._sync()
            if not self._broken:
                self._save()

    # ---- files ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        """Hold the ledger against all other threads and processes."""
        with self._mutex:
            try:
                with self._lock:
                    yield
            except OSError as error:
                self._broken = f"{self.path}: must be readable and writable: {error}"
                raise LedgerError(self._broken) from None

    def _fd(self, name: str) -> int:
        if name not in self._fds:
            flags = os.O_RDWR | os.O_CREAT | (os.O_APPEND if name in (LEDGER, TORN) else 0)
            self._fds[name] = os.open(self._folder / name, flags, 0o600)
            os.fchmod(self._fds[name], 0o600)
        return self._fds[name]

    def _restore(self) -> None:
        """Start from the saved totals, if they are of this very ledger."""
        try:
            content = json.loads((self._folder / STATE).read_bytes())
            at = Cursor(int(content["n"]), int(content["end"]), str(content["hash"]))
            last = os.pread(self._fd(LEDGER), 80, max(0, at.end - 80))
            if at.n and _END.search(last[:-1]) and last.endswith(f'"{at.hash}"}}\n'.encode()):
                self.totals = Totals.from_json(content["totals"])
                self._at, self._saved = at, at.n
        except (OSError, ValueError, KeyError, TypeError):
            self.totals, self._at = Totals(), Cursor()

    def _catch_up(self) -> None:
        """Read what was written since, here or by another process; repair what a crash left."""
        size = os.fstat(self._fd(LEDGER)).st_size
        if size < self._at.end:
            self._broken = f"{self.path}: {size} bytes: must be >= {self._at.end}, as it once was"
            raise LedgerError(self._broken)
        if size > self._at.end:
            for line, whole in lines(self._fd(LEDGER), self._at.end):
                if not whole:
                    self._repair(line)
                    break
                number = self._at.n + 1
                try:
                    self.totals.apply(self._at.read(line))
                except (LedgerError, *NO_LINE) as error:
                    self._broken = f"{self.path}, line {number}: {error}"
                    raise LedgerError(self._broken) from None
        torn = self._folder / TORN
        size = torn.stat().st_size if torn.exists() else 0
        if size > self.totals.torn:  # told in the chain, however often a crash came between
            entry = {"time": now(), "kind": "repair", "torn": size - self.totals.torn}
            self.totals.apply(entry)
            self._write(entry)

    def _repair(self, tail: bytes) -> None:
        """Move the torn last line aside: it was never complete, so what it describes never left."""
        _write_all(self._fd(TORN), tail)
        self._fsync(TORN)
        os.ftruncate(self._fd(LEDGER), self._at.end)
        self._fsync(LEDGER)

    def _check_head(self) -> None:
        head = read_head(self._folder)
        if head is not None and (
            head.n > self._at.n or (head.n == self._at.n and head.hash != self._at.hash)
        ):
            self._broken = (
                f"{self.path}: {self._at.n} lines: must be {head.n} or more, as {HEAD} says"
            )
            raise LedgerError(self._broken)

    def _write(self, entry: Entry) -> None:
        text = canonical({**entry, "n": self._at.n})
        digest = chained(self._at.hash, text)
        line = text[:-1] + f',"hash":"{digest}"}}\n'.encode()
        fd = self._fd(LEDGER)
        wait = entry["kind"] in _MAY_WAIT and self._waiting + 1 < self._sync_every
        try:
            _write_all(fd, line)
            if not wait:
                self._fsync(LEDGER)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(fd, self._at.end)
            raise
        self._at = Cursor(self._at.n + 1, self._at.end + len(line), digest)
        self._waiting = self._waiting + 1 if wait else 0
        if not wait:
            self._tell_head()

    def _sync(self) -> None:
        if self._waiting:
            self._fsync(LEDGER)
            self._waiting = 0
            self._tell_head()

    def _fsync(self, name: str) -> None:
        if self._durable:
            os.fsync(self._fd(name))

    def _tell_head(self) -> None:
        """Note where the ledger ends: behind the disk, never ahead of it."""
        at = self._at
        os.pwrite(self._fd(HEAD), f"{at.n} {at.end} {at.hash}".ljust(127).encode(), 0)

    def _save(self) -> None:
        content = {**vars(self._at), "totals": self.totals.to_json()}
        text = json.dumps(content, allow_nan=False)
        storage.write(self._folder / STATE, text, mode=storage.PRIVATE, durable=False)
        self._saved = self._at.n


def canonical(entry: Mapping[str, Any]) -> bytes:
    """Return the one JSON text of ``entry``: sorted keys, no spaces, ASCII.

    Raises:
        LedgerError: for a value that JSON cannot carry.
    """
    try:
        text = json.dumps(entry, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise LedgerError(f"ledger line: {error}") from None
    return text.encode()


def now() -> str:
    """Return the time, UTC, as lines carry it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def lines(fd: int, start: int = 0) -> Iterator[tuple[bytes, bool]]:
    """Yield (line without its break, whether it had one) from ``start`` on."""
    rest, at = b"", start
    while chunk := os.pread(fd, _CHUNK, at):
        at += len(chunk)
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line, True
    if rest:
        yield rest, False


def last_hash(folder: Path) -> str:
    """Return the hash in the last complete line; empty where there is none."""
    try:
        content = (folder / LEDGER).read_bytes()
    except OSError:
        return ""
    match = _END.search(content[: content.rfind(b"\n")])
    return match[1].decode() if match else ""


def read_head(folder: Path) -> Cursor | None:
    """Return what the head file says, or None where there is none."""
    try:
        n, end, digest = (folder / HEAD).read_text(encoding="utf-8").split()
        return Cursor(int(n), int(end), digest)
    except (OSError, ValueError):
        return None


def read_ledger(folder: Path) -> Iterator[Entry]:
    """Yield every line, checked; never changes a file.

    Raises:
        LedgerError: naming the first bad line (counted from 1), or lines missing at the end.
    """
    path = folder / LEDGER
    at = Cursor()
    head = read_head(folder)
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise LedgerError(f"{path}: must be a readable ledger: {error}") from None
    try:
        for line, whole in lines(fd):
            where = f"{path}, line {at.n + 1}"
            if not whole:
                raise LedgerError(
                    f"{where}: is cut off after {len(line)} bytes; what it describes never left; "
                    "the next session moves it to ledger.torn"
                )
            try:
                entry = at.read(line)
            except LedgerError as error:
                raise LedgerError(f"{where}: {error}") from None
            if head is not None and at.n == head.n and at.hash != head.hash:
                raise LedgerError(f"{where}: its hash is not the one in {HEAD}")
            yield entry
    finally:
        os.close(fd)
    if head is not None and head.n > at.n:
        raise LedgerError(f"{path}, line {at.n + 1}: is missing; {HEAD} tells of {head.n} lines")


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]
