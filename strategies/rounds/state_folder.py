"""States of a server on its disk, of which the newest sound one survives a crash at any moment.

::

    FOLDER/state-000012.json          a state: facts, and which files belong to it
    FOLDER/tensors-000012.safetensors its tensors; a state may name an earlier one's
    FOLDER/store-000003.safetensors   what was received since the state before; never rewritten
    FOLDER/lock                       held while a server works here

Data files come first, each synced and renamed into place; the JSON file, which names them with
their sizes and SHA-256, comes last.  A crash in between leaves the state before it.  The last two
states are kept: one whose files do not fit their digests is passed over, and that is said.
Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fedsplit import storage
from fedsplit.config.records import with_defaults
from fedsplit.errors import RunError

log = logging.getLogger(__name__)

FOLDER = "state"  # of a run's states, in its output.dir
FORMAT = "fedsplit-state-2"  # 1: noise of another key, and no moments of the averaging by name
KEPT = 2
MOST_SEGMENTS = 64
# What reading raises of a state that is damaged, whatever its digest says.
_UNSOUND = (
    *(OSError, ValueError, KeyError, TypeError),
    *(AttributeError, OverflowError, RuntimeError),
)
_NUMBER = re.compile(r"-(\d{6,})\.")


@dataclass(frozen=True)
class StateFile:
    """A data file as a state names it."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class State:
    """One state.

    Attributes:
        number: counts up with every state of the folder.
        facts: plain JSON values.
        tensors: by name.
        segments: files of what was received, in order; see :func:`safetensors.torch.load_file`.
    """

    number: int
    facts: dict[str, Any]
    tensors: dict[str, Tensor]
    segments: list[Path] = field(default_factory=list)


class StateFolder:
    """The states of one run; one process at a time.

    Args:
        path: the folder; made if need be.
        belongs: what the states belong to: settings and digests, by name.
        usual: what a state means that says nothing of a key: a setting that it did not know yet.
        wait_s: how long to wait for another process to let the folder go.

    Raises:
        RunError: another process works in it, or it cannot be written.
    """

    def __init__(
        self,
        path: Path,
        belongs: Mapping[str, Any],
        *,
        usual: Mapping[str, Any] | None = None,
        wait_s: float = 30.0,
    ) -> None:
        self.path = path
        self.belongs = dict(belongs)
        self._usual = dict(usual or {})
        self.skipped: list[str] = []  # states that could not be used, with the reason
        self.saves = 0
        self.bytes = 0
        self.seconds = 0.0
        self._tensors: StateFile | None = None
        self._segments: list[StateFile] = []
        self._kept: list[tuple[str, set[str]]] = []
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = storage.FileLock(path / "lock", wait_s)
            self._lock.acquire()
            numbers = [int(m[1]) for p in path.iterdir() if (m := _NUMBER.search(p.name))]
        except BlockingIOError:
            raise RunError(
                f"{path}: another run works in this folder; end it, or choose another output.dir"
            ) from None
        except OSError as error:
            raise RunError(f"cannot use {path}: {error}") from None
        self._next = max(numbers, default=0) + 1

    # ---- reading ----------------------------------------------------------------------------

    def check_settings(self) -> None:
        """Compare the newest state with ``belongs`` as far as that goes, before anything is built.

        Raises:
            RunError: the state is of another version, or of other settings (named).
        """
        for path in self._newest_first():
            try:
                document = json.loads(path.read_bytes())
                version, found = document["format"], dict(document["belongs"])
            except _UNSOUND:
                continue  # loading says so
            if version != FORMAT:
                raise RunError(
                    f"{path.parent.parent}: holds an interrupted run of another version, format "
                    f"{version!r}: must be {FORMAT!r}; choose another output.dir, or remove "
                    f"{path.parent} to begin anew"
                )
            self._must_belong(path, {k: v for k, v in found.items() if k in self.belongs})
            return

    def _newest_first(self) -> list[Path]:
        return sorted(self.path.glob("state-*.json"), key=lambda p: p.name, reverse=True)

    def load(self) -> State | None:
        """Return the newest sound state, or None where there is none at all.

        Raises:
            RunError: the state is of other settings (named), or none of the states is sound.
        """
        found = self._newest_first()
        for path in found:
            try:
                return self._read(path)
            except (*_UNSOUND, SafetensorError) as error:
                self.skipped.append(f"{path.name}: {error}")
                log.warning("state %s cannot be used, the one before it is: %s", path, error)
        if found:
            raise RunError(
                f"{self.path}: none of {len(found)} states can be used ({self.skipped[0]}); "
                "remove the folder to begin anew"
            )
        return None

    def _read(self, path: Path) -> State:
        document = json.loads(path.read_bytes())
        digest = document.pop("sha256")
        if document["format"] != FORMAT:
            raise ValueError(f"format {document['format']!r}: must be {FORMAT}")
        if hashlib.sha256(_text(document)).hexdigest() != digest:
            raise ValueError("its contents do not fit its digest")
        self._must_belong(path, document["belongs"])
        tensors = StateFile(**document["tensors"])
        segments = [StateFile(**entry) for entry in document["store"]]
        for file in (tensors, *segments):
            self._verify(file)
        state = State(
            int(document["number"]),
            dict(document["facts"]),
            load_file(self.path / tensors.name),
            [self.path / file.name for file in segments],
        )
        self._tensors, self._segments = tensors, segments
        self._kept = [(path.name, {tensors.name, *(file.name for file in segments)})]
        return state

    def _must_belong(self, path: Path, found: Mapping[str, Any]) -> None:
        meant = with_defaults(found, self._usual)
        for key in sorted(self.belongs.keys() | found.keys()):
            mine, theirs = self.belongs.get(key), meant.get(key)
            if mine != theirs:
                raise RunError(
                    f"{path.parent.parent}: holds an interrupted run with {key}={theirs!r}: must "
                    f"be {mine!r} as in this run; choose another output.dir, or remove "
                    f"{path.parent} to begin anew"
                )

    def _verify(self, file: StateFile) -> None:
        path = self.path / file.name
        size = path.stat().st_size
        if size != file.bytes:
            raise ValueError(f"{file.name} has {size} bytes: must be {file.bytes}")
        if _sha256(path) != file.sha256:
            raise ValueError(f"{file.name}: its contents do not fit its digest")

    # ---- writing ----------------------------------------------------------------------------

    def save(
        self,
        facts: Mapping[str, Any],
        tensors: Mapping[str, Tensor] | None = None,
        segment: Mapping[str, Tensor] | None = None,
        *,
        whole: bool = False,
    ) -> None:
        """Write a state; on any failure the one before is intact.

        Args:
            facts: plain JSON values.
            tensors: by name; None = those of the state before.
            segment: what was received since then; None = nothing.
            whole: the segment replaces all before it.

        Raises:
            RunError: it cannot be written (disk full, for one).
        """
        began = time.perf_counter()
        number = self._next
        self._next += 1
        name = f"state-{number:06d}.json"
        try:
            if tensors is not None:
                self._tensors = self._write(f"tensors-{number:06d}.safetensors", tensors)
            if segment:
                file = self._write(f"store-{number:06d}.safetensors", segment)
                self._segments = [file] if whole else [*self._segments, file]
            if self._tensors is None:
                raise RunError("a run's first state: must bring tensors")
            document = {
                "format": FORMAT,
                "number": number,
                "belongs": self.belongs,
                "facts": dict(facts),
                "tensors": asdict(self._tensors),
                "store": [asdict(file) for file in self._segments],
            }
            digest = hashlib.sha256(_text(document)).hexdigest()
            # Each data file is there for good, name and all, before anything names it.
            storage.write(self.path / name, _text({**document, "sha256": digest}))
        except OSError as error:
            raise RunError(f"cannot write {self.path / name}: {error}") from None
        files = {self._tensors.name, *(file.name for file in self._segments)}
        self._kept = [*self._kept, (name, files)][-KEPT:]
        self._sweep()
        self.saves += 1
        self.seconds += time.perf_counter() - began

    @property
    def crowded(self) -> bool:
        """Whether the next segment should hold everything, so that few files remain."""
        return len(self._segments) >= MOST_SEGMENTS

    def _write(self, name: str, tensors: Mapping[str, Tensor]) -> StateFile:
        path = self.path / name
        storage.write_tensors(path, tensors)
        file = StateFile(name, path.stat().st_size, _sha256(path))
        self.bytes += file.bytes
        return file

    def _sweep(self) -> None:
        """Remove what no kept state names."""
        named = {"lock"}.union(*({name} | files for name, files in self._kept))
        for path in self.path.iterdir():
            if path.name not in named:
                with contextlib.suppress(OSError):
                    path.unlink()

    def report(self) -> dict[str, Any]:
        """Return what keeping states has cost, JSON-able."""
        return {"saves": self.saves, "bytes": self.bytes, "seconds": self.seconds}

    def clear(self) -> None:
        """Remove all states and the folder: the run is complete."""
        self._kept = []
        self._sweep()
        with contextlib.suppress(OSError):
            (self.path / "lock").unlink()
            self.path.rmdir()

    def close(self) -> None:
        """Let the folder go."""
        self._lock.release()


def _text(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, allow_nan=False).encode()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
