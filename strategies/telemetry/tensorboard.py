"""Scalars in TensorBoard's event files; needs the ``tensorboard`` extra."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from fedsplit.errors import ConfigError, RunError


class EventFile:
    """New event file; any thread may write.

    Each record is with the operating system when the call returns: a run that is killed keeps its
    curves.

    Args:
        folder: where TensorBoard's ``--logdir`` points.

    Raises:
        ConfigError: TensorBoard is not installed.
        RunError: the file cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboard.compat.proto.event_pb2 import Event
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError as error:
            raise ConfigError(
                f"output.tensorboard=True: needs the tensorboard extra ({error.name} is missing): "
                "pip install fedsplit[tensorboard]"
            ) from error
        now = time.time()
        self.path = folder / f"events.out.tfevents.{int(now)}.fedsplit.{os.getpid()}"
        self._event = Event
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = RecordWriter(open(self.path, "ab", buffering=0))  # noqa: SIM115
            version = Event(wall_time=now, file_version="brain.Event:2")
            self._writer.write(version.SerializeToString())
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written: {error}") from None

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write the finite ones of ``scalars``, as 32-bit floats, at ``step`` >= 0.

        Raises:
            OSError: the disk is full.
        """
        event = self._event(wall_time=time.time(), step=step)
        for tag, value in scalars.items():
            if math.isfinite(value) and abs(value) < 3e38:
                event.summary.value.add(tag=tag, simple_value=value)
        if event.summary.value:
            with self._lock:
                self._writer.write(event.SerializeToString())

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._writer.close()


def scalars_of(row: Mapping[str, object]) -> Iterator[tuple[str, float]]:
    """Yield (tag, number) of the curves that a round's row in ``server.json`` adds to."""
    for mode in ("train", "evaluate"):
        part = row.get(mode)
        if not isinstance(part, Mapping):
            continue
        metrics = part.get("metrics")
        for key in ("loss", "accuracy", "epsilon", "share-touched"):
            value = metrics.get(key) if isinstance(metrics, Mapping) else None
            if isinstance(value, (int, float)):
                yield f"{mode}/{key}", value
        for key in ("bytes_up", "bytes_down", "row_tokens", "wall_s", "compute_s", "waiting_s"):
            if isinstance(value := part.get(key), (int, float)):
                yield f"{mode}/{key}", value
        for key in ("finished", "lost"):
            if isinstance(value := part.get(key), (list, dict)):
                yield f"{mode}/owners_{key}", len(value)
    lineage = row.get("lineage")
    for key in ("score", "pcs", "ics", "worst"):
        value = lineage.get(key) if isinstance(lineage, Mapping) else None
        if isinstance(value, (int, float)):
            yield f"lineage/{key}", value
    if isinstance(value := row.get("plug_in_loss"), (int, float)):
        yield "evaluate/plug_in_loss", value
