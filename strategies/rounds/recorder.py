"""What the server writes down: one row per round, the transcript, progress lines.

Everything that happens in a run is told to the Recorder once; it keeps the files that results are
made of, and passes the rest on to the run's observers (:mod:`strategies.telemetry.observers`).
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Self

from fedsplit import storage
from fedsplit.attacks.recorded_frames import read_frames
from fedsplit.attacks.transcripts import CAPTURE, TRANSCRIPT, transcript_tensors
from fedsplit.config import RunConfig
from fedsplit.errors import RunError
from fedsplit.wire.frames import KIND_AT, Kind
from fedsplit.wire.link import Link

from ..sessions.representation_cache import RepresentationCache
from ..telemetry.observers import Observers
from .state_folder import FOLDER

log = logging.getLogger(__name__)

PROGRESS = "fedsplit-progress "
WAIT_S = 30.0  # for a server that was told to end


class Recorder:
    """Keeps ``server.json`` in the run's folder up to date, and says on the log how far it is.

    Args:
        folder: where to write; None = nowhere (progress is still logged).
        keep: parts of the output's settings that frames are kept for, in
            ``capture/<node>-<mode>.bin``: ``capture`` leaves them there, ``transcript`` alone makes
            ``transcript.safetensors`` of them and removes them; none: no frame is kept.
        max_bytes: bound on the frames kept; those that come later are counted and left out.
        observers: are told everything too; None = nobody watches.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        keep: Collection[str] = (),
        max_bytes: int = 1 << 31,
        observers: Observers | None = None,
    ) -> None:
        self._folder = folder
        self._observers = observers
        self._keep = frozenset(keep) if folder is not None else frozenset[str]()
        self._max = max_bytes
        self._kept = 0
        self._left_out = 0
        self._files: dict[str, BinaryIO] = {}
        self._lock = threading.Lock()
        self._spoke = 0.0
        self.content: dict[str, Any] = {"rounds": []}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._kept = sum(path.stat().st_size for path in (folder / CAPTURE).glob("*.bin"))

    @classmethod
    def of(cls, config: RunConfig, run: int) -> Self:
        """Return the recorder of one run, with the observers that its settings ask for.

        Raises:
            ConfigError, RunError: see :class:`~strategies.telemetry.observers.Observers`.
        """
        folder = Path(config.output.dir) if config.output.dir else None
        o = config.output
        keep = [n for n, asked in ((CAPTURE, o.capture), ("transcript", o.transcript)) if asked]
        bound = o.record_mb << 20
        return cls(folder, keep=keep, max_bytes=bound, observers=Observers(config, run))

    @classmethod
    @contextmanager
    def open(cls, config: RunConfig, run: int) -> Iterator[Self]:
        """Yield :meth:`of`'s recorder; write down a failure of what is done with it, and close it.

        Rows of an interrupted run in the same folder are kept.  No other run works in the folder
        meanwhile, nor writes what it failed of into this run's files.

        Raises:
            ConfigError: see :meth:`of`.
            RunError: also that another run works in the folder.
        """
        with _alone(config.output.dir):
            recorder = cls.of(config, run)
            if config.output.dir and (Path(config.output.dir) / FOLDER).exists():
                recorder.content |= _earlier_content(Path(config.output.dir))
            else:
                recorder.forget_frames()
            try:
                yield recorder
            except BaseException as error:
                with suppress(RunError):  # a full disk, say, is no reason to hide the first error
                    recorder.write(status="failed", error=f"{type(error).__name__}: {error}")
                raise
            finally:
                recorder.close()

    def forget_frames(self) -> None:
        """Remove frames that an earlier run left in the folder."""
        if self._folder is not None:
            shutil.rmtree(self._folder / CAPTURE, ignore_errors=True)
            self._kept = 0

    def round_started(self, number: int, mode: str, asked: int) -> None:
        """Take note that the offers of round ``number`` go out to so many owners."""
        if self._observers is not None:
            self._observers.round_started(number, mode, asked)

    def session_opened(self, owner: str, node: int, link: Link) -> None:
        """Take note that an owner's session was accepted."""
        if self._keep and self._folder is not None:
            folder = self._folder / CAPTURE
            folder.mkdir(exist_ok=True)
            (folder / f"{node}.owner").write_text(owner, encoding="utf-8")
        if self._observers is not None:
            self._observers.session_opened(owner, node, link)

    def write(self, **values: Any) -> None:
        """Set top-level values and write the file (complete or not at all).

        Raises:
            RunError: the disk is full or not writable; names the file.
        """
        self.content.update(values)
        if self._observers is not None:
            self._observers.results_changed(self.content)
        if self._folder is None:
            return
        path = self._folder / "server.json"
        try:
            content = json.dumps(self.content, indent=1, allow_nan=False).encode()
            storage.write(path, content + storage.ROOM)
        except OSError as error:
            if "status" in values:  # how the run ended is told even on a full disk
                with suppress(OSError, ValueError):
                    storage.set_in_place(path, **values)
            raise RunError(f"cannot write {path}: {error}") from None

    def round(self, row: dict[str, Any]) -> None:
        """Add or extend the row of ``row["round"]``."""
        rows = self.content["rounds"]
        if rows and rows[-1]["round"] == row["round"]:
            rows[-1].update(row)
        else:
            rows.append(row)
        if self._observers is not None:
            self._observers.round_recorded(row)
        self.write()

    def progress(self, **values: Any) -> None:
        """Log one machine-readable line, at most twice a second unless ``force`` is given."""
        if self._observers is not None and "step" in values:
            self._observers.step_done(values)
        now = time.monotonic()
        if not values.pop("force", False) and now - self._spoke < 0.5:
            return
        self._spoke = now
        log.info("%s%s", PROGRESS, json.dumps(values))

    def phase_ended(
        self,
        number: int,
        rounds: int,
        mode: str,
        metrics: Mapping[str, Any],
        lineage: Mapping[str, Any],
    ) -> None:
        """Log the line that ends a round's training or evaluation."""
        self.progress(
            force=True,
            round=number,
            rounds=rounds,
            mode=mode,
            done=True,
            loss=metrics.get("loss"),
            accuracy=metrics.get("accuracy"),
            verdict=lineage.get("verdict"),
        )

    def on_bytes(self, node: int, mode: str, data: bytes) -> None:
        """Keep one frame as it crossed, with its length before it; not the bottom's files."""
        if not self._keep or self._folder is None or data[KIND_AT] == Kind.FILE:
            return
        with self._lock:
            if self._left_out or self._kept + 8 + len(data) > self._max:
                if not self._left_out:
                    log.warning("frames over output.record-mb are left out from now on")
                self._left_out += 1
                return
            self._kept += 8 + len(data)
            name = f"{node}-{mode}"
            if name not in self._files:
                folder = self._folder / CAPTURE
                folder.mkdir(exist_ok=True)
                self._files[name] = open(folder / f"{name}.bin", "ab")  # noqa: SIM115
            self._files[name].write(len(data).to_bytes(8, "little") + data)

    def transcript(self, store: RepresentationCache) -> None:
        """Write all that crossed, both ways, for attacks to be measured on.

        Raises:
            RunError: the disk is full or not writable.
        """
        if self._folder is None:
            return
        self._close_files()
        folder = self._folder / CAPTURE
        steps = read_frames(folder)
        if held := store.tensors():  # of a frozen bottom, as exact as they came
            steps.rows.clear()
        tensors = {**held, **transcript_tensors(steps, held)}
        try:
            storage.write_tensors(self._folder / TRANSCRIPT, tensors, durable=False)
        except OSError as error:
            raise RunError(f"cannot write the transcript in {self._folder}: {error}") from None
        self.write(recorded={"bytes": self._kept, "frames_left_out": self._left_out})
        if CAPTURE not in self._keep:
            shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Close the capture's files and let the observers go."""
        if self._observers is not None:
            self._observers.close()
        self._close_files()

    def _close_files(self) -> None:
        with self._lock:
            for file in self._files.values():
                with suppress(OSError):  # a full disk costs the end of a capture
                    file.close()
            self._files.clear()


@contextmanager
def _alone(output_dir: str) -> Iterator[None]:
    """Hold a run's folder, if it has one, against other runs.

    Raises:
        RunError: another run works in it, or it cannot be made.
    """
    if not output_dir:
        yield
        return
    folder = Path(output_dir)
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(storage.working_in(folder, WAIT_S))
        except BlockingIOError:
            raise RunError(
                f"{folder}: another run works in this folder; end it, or choose another output.dir"
            ) from None
        except OSError as error:
            raise RunError(f"cannot use {folder}: {error}") from None
        yield


def _earlier_content(folder: Path) -> dict[str, Any]:
    """Return what stands of an interrupted run's ``server.json``; nothing if it cannot be read."""
    try:
        content = json.loads((folder / "server.json").read_bytes())
        rows = [dict(row) for row in content["rounds"]]
        return {"rounds": rows, "resumed": [dict(row) for row in content.get("resumed", [])]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
