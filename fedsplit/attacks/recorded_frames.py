"""Frames of recorded sessions, put together as a transcript: both directions, sample by sample."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsplit.attacks.transcripts import Samples, Transcript
from fedsplit.errors import AttackError, FrameError
from fedsplit.wire.codecs import decode_rows
from fedsplit.wire.frames import Frame, Kind, decode


def read_capture(folder: Path) -> Transcript:
    """Put together what a run with ``output.capture = true`` recorded of its owners' sessions.

    Gradients are scaled to each target's own loss: a step's mean divides them.  Outputs are kept
    where a gradient answers them; a recording of an earlier version has none.

    Args:
        folder: one file of frames per node and mode, session after session, and the node's
            owner's name in ``NODE.owner`` (else its node number stands for it).

    Raises:
        AttackError: nothing was recorded, or a file is damaged.
    """
    found = read_frames(folder)
    if not found.received:
        raise AttackError(f"{folder}: must hold recorded sessions; run with output.capture = true")
    return found


def read_frames(folder: Path) -> Transcript:
    """Return what a folder of frames holds, which may be nothing; see :func:`read_capture`.

    Raises:
        AttackError: a file is damaged.
    """
    found = Transcript()
    for path in sorted(folder.glob("*.bin")):
        node, _, mode = path.stem.partition("-")
        key = (_owner(folder, node), "train" if mode == "train" else "test")
        batches: dict[int, list[int]] = {}
        lengths: dict[int, int] = {}
        outputs: dict[int, Frame] = {}
        for frame in frames(path):
            try:
                if frame.kind is Kind.BATCH:
                    slots, fresh = list(frame["slots"]), list(frame["fresh"])
                    batches[frame["step"]] = slots
                    sizes = list(frame["lengths"])
                    lengths |= dict(zip(fresh, sizes, strict=True))
                    if fresh:
                        body = decode_rows(frame.body, (sum(sizes), frame["dim"]), frame["codec"])
                        for slot, row in zip(fresh, torch.split(body, sizes), strict=True):
                            _append(found.rows, key, slot, row)
                elif frame.kind is Kind.LOGITS:
                    outputs = {frame["step"]: frame}  # of one step at a time
                elif frame.kind is Kind.GRAD and frame["step"] in batches and frame["shape"][0]:
                    slots = batches[frame["step"]]
                    gradient, single = _values(frame), frame["shape"][0] == len(slots)
                    gradient *= len(slots) if single else frame["weight"]
                    sizes = [1 if single else lengths[slot] for slot in slots]
                    at = _append_all(found.gradients, key, slots, _parts(gradient, sizes, single))
                    sent = outputs.get(frame["step"])
                    if sent is not None and sent["shape"] == frame["shape"]:
                        while len(found.outputs) < len(found.gradients):
                            found.outputs.append({})
                        parts = _parts(_values(sent), sizes, single)
                        for number, slot, part in zip(at, slots, parts, strict=True):
                            found.outputs[number].setdefault(key, {})[slot] = part
            except (FrameError, ValueError, KeyError):  # its session refused it too
                continue
    return found


def frames(path: Path) -> Iterator[Frame]:
    """Yield the frames of one recorded session after another, both directions in their order.

    Bytes that are no frame ended their session and are left out.

    Raises:
        AttackError: the file is damaged.
    """
    data = path.read_bytes()
    at = 0
    while at < len(data):
        length = int.from_bytes(data[at : at + 8], "little")
        if length > len(data) - at - 8:
            raise AttackError(f"{path}: byte {at}: {length} bytes: must be <= {len(data) - at - 8}")
        with suppress(FrameError):
            yield decode(data[at + 8 : at + 8 + length], length)
        at += 8 + length


def _values(frame: Frame) -> Tensor:
    return decode_rows(frame.body, tuple(frame["shape"]), frame["codec"]).float()


def _parts(rows: Tensor, sizes: list[int], single: bool) -> Any:
    return rows if single else torch.split(rows, sizes)


def _owner(folder: Path, node: str) -> str:
    path = folder / f"{node}.owner"
    return path.read_text(encoding="utf-8") if path.is_file() else node


def _append_all(
    views: list[Samples], key: tuple[str, str], slots: list[int], rows: Any
) -> list[int]:
    return [_append(views, key, slot, row) for slot, row in zip(slots, rows, strict=True)]


def _append(views: list[Samples], key: tuple[str, str], slot: int, row: Tensor) -> int:
    """Add one sample to the first view that lacks it; return that view's number."""
    for number, held in enumerate(views):
        if slot not in held.setdefault(key, {}):
            held[key][slot] = row
            return number
    views.append({key: {slot: row}})
    return len(views) - 1
