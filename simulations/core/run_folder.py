"""One run, one folder: what was asked, what came out, on which machine.

A folder holds

- ``config.toml``: the effective configuration, as it was run;
- ``results.json``: strict JSON (see below), replaced atomically each time it is written;
- ``log/``: the log files of the processes (:attr:`RunFolder.logs`);
- anything else the experiment leaves (adapters, transcripts, plots).

``results.json`` always has

============ =======================================================================================
``schema``     1
``name``       the experiment's name
``kind``       one of the kinds below
``status``     ``running`` | ``completed`` | ``failed`` | ``interrupted``
``started``    UTC, ISO 8601
``ended``      the same; null while running
``time_s``     seconds from the start to this writing
``versions``   of python, fedsplit, flwr, ray, torch, transformers, numpy (null: not installed),
             and the git ``commit`` of the checkout (``+``: files differ; null: none)
``machine``    ``cpu``, ``cores``, ``memory_bytes``, ``platform``, ``gpus``
``error``      null, or why the run failed
``notes``      what the writer had to change, such as ``loss: NaN written as null``
============ =======================================================================================

and beside these the experiment's own keys.  Required of a completed run, per kind
(:data:`REQUIRED`):

- ``split``: ``utility`` (``metric``, ``federated``, ``centralised``, ``baseline``), ``privacy``,
  ``lineage`` (a row per round: ``pcs``, ``ics``, ``verdict``), ``traffic`` (``bytes_up``,
  ``bytes_down``, ``bytes_per_token``, ``messages``), ``owners``, ``seed``, ``data_digest``;
- ``table``: ``rows``, a list of flat tables.

Results of a run that did not complete are kept and may lack keys: look at ``status`` first.

While a run goes on, the file ends in blanks: room for how it ended, should the disk be full then.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, get_args

import tomli_w

from fedsplit import storage
from fedsplit.errors import ConfigError, RunError, check
from simulations.runtime.machine import machine, versions

Status = Literal["running", "completed", "failed", "interrupted"]
STATUSES: tuple[Status, ...] = get_args(Status)
SCHEMA = 1
RUNTIME = ("server", "homes")  # what a run makes, and what the next one in its folder removes
TOP_LEVEL = (
    *("schema", "name", "kind", "status", "started", "ended", "time_s"),
    *("versions", "machine", "error", "notes"),
)

# kind -> key -> None (anything), columns of a table, or columns of each table in a list
Shape = None | tuple[Literal["table", "rows"], tuple[str, ...]]
REQUIRED: dict[str, dict[str, Shape]] = {
    "split": {
        "utility": ("table", ("metric", "federated", "centralised", "baseline")),
        "privacy": ("table", ()),
        "lineage": ("rows", ("round", "verdict")),
        "traffic": ("table", ("bytes_up", "bytes_down", "bytes_per_token", "messages")),
        "owners": None,
        "seed": None,
        "data_digest": None,
    },
    "table": {"rows": ("rows", ())},
}


class RunFolder:
    """The folder of one run; as a context manager it also records how the run ended.

    Leaving the ``with`` block normally marks the run ``completed``, Ctrl-C and SIGTERM mark it
    ``interrupted``, any other exception ``failed``; what was recorded before is kept.
    """

    def __init__(self, path: Path, *, name: str, kind: str, force: bool = False) -> None:
        """Make the folder and write its first ``results.json``, marked ``running``.

        Args:
            path: the folder; :func:`default_folder` suggests one.
            name: the experiment's name.
            kind: which keys its results must have.
            force: allow a folder that holds a completed run; its results are replaced.

        Raises:
            ConfigError: for an unknown kind.
            RunError: if the folder holds a completed run, one that goes on, or what no run left, is
                no folder, or cannot be written.
        """
        check(kind in REQUIRED, "kind", kind, f"one of {', '.join(sorted(REQUIRED))}")
        self.path = Path(path).absolute()
        self.results_path = self.path / "results.json"
        self.logs = self.path / "log"
        self._held = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                stack.enter_context(storage.working_in(self.path, wait_s=0))
                self._refuse_others(force)
                self.logs.mkdir(exist_ok=True)
            except BlockingIOError:
                raise RunError(
                    f"{self.path}: another run is at work in this folder; choose another one"
                ) from None
            except OSError as error:
                raise RunError(f"{self.path}: cannot be made a run folder: {error}") from error
            self._held = stack.pop_all()
        self._began = time.monotonic()
        self._document: dict[str, Any] = {
            "schema": SCHEMA,
            "name": name,
            "kind": kind,
            "status": "running",
            "started": _now(),
            "ended": None,
            "time_s": 0.0,
            "versions": versions(),
            "machine": machine(),
            "error": None,
            "notes": [],
        }
        self._results: dict[str, Any] = {}
        self._write()

    def _refuse_others(self, force: bool) -> None:
        if not force and _status_of(self.results_path) == "completed":
            raise RunError(
                f"{self.path}: holds a completed run; choose another folder, or go on in it with "
                "--force: results are written anew, finished cells of the same settings are kept"
            )
        foreign = [name for name in RUNTIME if (self.path / name).exists()]
        if foreign and not self.results_path.exists():
            raise RunError(
                f"{self.path}: holds {' and '.join(foreign)} but no results.json: a run would "
                "remove what is in there; choose another folder"
            )

    def __enter__(self) -> Self:
        """Return the folder."""
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        """Record how the run ended; an explicit earlier :meth:`mark` other than running stays."""
        if error is None:
            if self.status == "running":
                self.mark("completed")
            return
        interrupted = isinstance(error, (KeyboardInterrupt, SystemExit))
        # The run's own error is what the caller must see, even if recording it fails too.
        with self._held, contextlib.suppress(RunError):
            told = f"{type(error).__name__}: {error}".removesuffix(": ")
            self.mark("interrupted" if interrupted else "failed", error=told)

    @property
    def status(self) -> str:
        """How the run stands."""
        return str(self._document["status"])

    @property
    def results(self) -> dict[str, Any]:
        """The experiment's own keys, as recorded so far."""
        return dict(self._results)

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write the effective configuration, flat or nested, to ``config.toml``; None is left out.

        Raises:
            ConfigError: if it holds something that TOML cannot express.
            RunError: if the file cannot be written.
        """
        path = self.path / "config.toml"
        try:
            content = tomli_w.dumps(_without_none(config)).encode()
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{path}: {error}") from None
        write_atomically(path, content)

    def record(self, **results: Any) -> None:
        """Set keys of the experiment's own and write the file: a crash loses nothing.

        Raises:
            ConfigError: for a value that JSON cannot express, or a key that every run has.
            RunError: if the file cannot be written; the previous one is intact.
        """
        for key in results:
            check(key not in TOP_LEVEL, "results key", key, "none of those every run has")
        merged = {**self._results, **results}
        self._write(merged)
        self._results = merged

    def mark(self, status: Status, error: str | None = None) -> None:
        """Set the status; ``completed`` requires the keys of the run's kind.

        With any but ``running`` the folder is let go.  On a full disk what was recorded before
        stays, and the end is written into the room that was kept for it.

        Raises:
            ConfigError: for an unknown status.
            RunError: if a required key is missing, or the file cannot be written.
        """
        check(status in STATUSES, "status", status, f"one of {', '.join(STATUSES)}")
        if status == "completed":
            check_results(str(self._document["kind"]), self._results)
        self._write(self._results, status=status, error=error)
        if status != "running":
            self._held.close()

    def _write(self, results: Mapping[str, Any] | None = None, **changes: Any) -> None:
        """Write the file with ``changes``, which are remembered only if that succeeds."""
        document = {**self._document, **changes}
        notes: list[str] = []
        own = strict(results or {}, "", notes)
        document["notes"] = notes
        document["ended"] = None if document["status"] == "running" else _now()
        document["time_s"] = round(time.monotonic() - self._began, 3)
        whole = {**document, **own}
        text = json.dumps(whole, indent=2, allow_nan=False, ensure_ascii=False)
        goes_on = document["status"] == "running"
        content = text.encode("utf-8", "replace") + (storage.ROOM if goes_on else b"\n")
        try:
            write_atomically(self.results_path, content)
        except RunError:
            if goes_on:
                raise
            with contextlib.suppress(OSError, ValueError):
                end = {key: document[key] for key in ("status", "error", "ended", "time_s")}
                storage.set_in_place(self.results_path, **end)
                self._document = document
                return
            raise
        self._document = document


def default_folder(name: str, parent: Path = Path("runs")) -> Path:
    """Make ``parent/NAME-YYYYmmdd-HHMMSS`` (local time), with a suffix if it exists, and return it.

    Raises:
        RunError: it cannot be made.
    """
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "run"
    stem = f"{safe}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    for number in itertools.count(1):
        path = parent / (stem if number == 1 else f"{stem}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:  # of another run that began in the same second
            continue
        except OSError as error:
            raise RunError(f"{path}: cannot be made a run folder: {error}") from error
        return path
    raise AssertionError


def read_results(path: Path) -> dict[str, Any]:
    """Read and check a ``results.json`` (or the folder that holds one).

    Raises:
        RunError: if it is missing, not strict JSON, or lacks a required key.
    """
    path = path / "results.json" if path.is_dir() else path
    try:
        document = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: no readable results: {error}") from error
    missing = [key for key in TOP_LEVEL if not isinstance(document, dict) or key not in document]
    if missing:
        raise RunError(f"{path}: lacks {', '.join(missing)}")
    if document["schema"] != SCHEMA:
        raise RunError(f"{path}: schema={document['schema']!r}: must be {SCHEMA}")
    if document["status"] == "completed":
        try:
            check_results(document["kind"], document)
        except RunError as error:
            raise RunError(f"{path}: {error}") from None
    return dict(document)


def check_results(kind: str, results: Mapping[str, Any]) -> None:
    """Check that ``results`` has the keys required of its ``kind``.

    Raises:
        RunError: names the first key that is missing or of the wrong shape.
    """
    if kind not in REQUIRED:
        raise RunError(f"kind={kind!r}: must be one of {', '.join(sorted(REQUIRED))}")
    for key, shape in REQUIRED[kind].items():
        if key not in results:
            raise RunError(f"{key}: missing; results of kind {kind!r} must have it")
        if shape is None:
            continue
        (form, columns), value = shape, results[key]
        rows = {key: value}
        if form == "rows":
            if not isinstance(value, Sequence) or isinstance(value, str):
                raise RunError(f"{key}: must be a list of tables, not {type(value).__name__}")
            rows = {f"{key}[{index}]": row for index, row in enumerate(value)}
        for where, row in rows.items():
            if not isinstance(row, Mapping):
                raise RunError(f"{where}: must be a table, not {type(row).__name__}")
            if absent := [c for c in columns if c not in row]:
                raise RunError(f"{where}: lacks {', '.join(absent)}")


def _without_none(table: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, Mapping) else value
        for key, value in table.items()
        if value is not None
    }


def write_atomically(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content``, durably; on any failure the previous file is intact.

    Raises:
        RunError: names the path and the bytes, for example when the disk is full.
    """
    try:
        storage.write(path, content, mode=0o644, concurrent=True)
    except OSError as error:
        raise RunError(
            f"{path}: cannot write {len(content)} bytes: {error.strerror or error}"
        ) from error


def strict(value: Any, where: str, notes: list[str]) -> Any:
    """Return ``value`` as strict JSON: NaN and infinities become null, each with a note.

    Takes also tuples, paths, and whatever has ``tolist`` (NumPy and torch scalars and arrays).

    Raises:
        ConfigError: for anything else; names the place.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        notes.append(f"{where or 'results'}: {value} written as null")
        return None
    if isinstance(value, Mapping):
        inner = f"{where}." if where else ""
        return {str(key): strict(item, f"{inner}{key}", notes) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item, f"{where}[{index}]", notes) for index, item in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return strict(value.tolist(), where, notes)
    raise ConfigError(f"{where or 'results'}={type(value).__name__}: must be expressible in JSON")


def _status_of(path: Path) -> str | None:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return document.get("status") if isinstance(document, dict) else None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
