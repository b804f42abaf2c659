"""What an offsite-tuning run leaves behind: round by round, and at its end.

``adapters.safetensors`` is written after every round, synced to the disk; the round before is kept
as ``adapters.previous.safetensors``; where the averaging has a state (FedAdam's moments), likewise
``averaging.safetensors``.  At the end: ``adapter/`` (for PEFT where it can express the
method, see :mod:`fedsplit.models.adapters.files`) and ``model/``, the plugged-in model as an
ordinary Hugging Face folder (not for methods whose modules no Hugging Face class has).
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedsplit import storage
from fedsplit.errors import ModelError, RunError, UnsupportedModelError
from fedsplit.models.adapters.files import save_adapter
from fedsplit.models.adapters.methods import BlockTuning, MethodSettings
from fedsplit.models.loading import LoadedModel

from ..rounds.averaging import AveragingState

log = logging.getLogger(__name__)

ADAPTERS = "adapters.safetensors"
PREVIOUS = "adapters.previous.safetensors"
AVERAGING = "averaging.safetensors"
AVERAGING_PREVIOUS = "averaging.previous.safetensors"


def keep_adapters(
    folder: Path, number: int, state: dict[str, Tensor], digest: str, settings: MethodSettings
) -> None:
    """Write the averaged adapters after a round, whole or not at all, and keep the round before.

    Raises:
        RunError: they cannot be written.
    """
    metadata = {"round": str(number), "emulator": digest, "method": _identity(settings)}
    _replace(folder / ADAPTERS, folder / PREVIOUS, state, metadata)


def keep_averaging(folder: Path, number: int, state: AveragingState, digest: str) -> None:
    """Write what the averaging carries, before the round's adapters: a crash between finds both.

    Nothing is written where it carries nothing.

    Raises:
        RunError: it cannot be written.
    """
    if not state.arrays:
        return
    # As hexadecimal numbers: what is read back is the same float, bit for bit.
    facts = json.dumps({name: value.hex() for name, value in state.facts.items()})
    metadata = {"round": str(number), "emulator": digest, "facts": facts}
    arrays = {n: torch.from_numpy(a) for n, a in state.arrays.items()}
    _replace(folder / AVERAGING, folder / AVERAGING_PREVIOUS, arrays, metadata)


def kept_averaging(folder: Path, number: int, digest: str) -> AveragingState:
    """Return what the averaging carried after that round; empty, with a warning, if it is lost."""
    for path in (folder / AVERAGING, folder / AVERAGING_PREVIOUS):
        if not path.exists():
            continue
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                if (about.get("round"), about.get("emulator")) != (str(number), digest):
                    continue
                facts = {str(n): float.fromhex(v) for n, v in json.loads(about["facts"]).items()}
                names = file.keys()
                return AveragingState({n: file.get_tensor(n).numpy() for n in names}, facts)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s: no readable state of the averaging: %s", path, error)
    return AveragingState()


def _replace(
    path: Path, previous: Path, state: dict[str, Tensor], metadata: dict[str, str]
) -> None:
    try:
        storage.write_tensors(path, state, metadata, previous=previous)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error}") from None


def kept_adapters(
    folder: Path, digest: str, settings: MethodSettings
) -> tuple[int, dict[str, Tensor]] | None:
    """Return (rounds done, adapters) of an interrupted run with this emulator and method, or None.

    Where the last round's file is damaged or missing, the round before counts.

    Raises:
        ModelError: there are files, and none can be read.
    """
    faults = []
    for path in (folder / ADAPTERS, folder / PREVIOUS):
        if not path.exists():
            continue
        try:
            return _read(path, digest, settings)
        except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
            log.warning("%s: no readable adapters: %s", path, error)
            faults.append(f"{path}: {error}")
    if faults:
        raise ModelError(f"no readable adapters: {'; '.join(faults)}")
    return None


def _read(
    path: Path, digest: str, settings: MethodSettings
) -> tuple[int, dict[str, Tensor]] | None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        same = metadata.get("emulator") == digest and metadata.get("method") == _identity(settings)
        if not same:
            return None
        return int(metadata["round"]), {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118


def _identity(settings: MethodSettings) -> str:
    """What decides the names and shapes of adapters, and what they mean."""
    return json.dumps({k: v for k, v in asdict(settings).items() if k != "seed"}, sort_keys=True)


def export(folder: Path, loaded: LoadedModel, tuning: BlockTuning) -> dict[str, Any]:
    """Write ``adapter/`` and ``model/``; the tuning is folded into the model where it can be.

    Returns:
        What was written and in which format, and why something was not.

    Raises:
        RunError: the disk cannot be written.
    """
    about: dict[str, Any] = {"adapter": None, "model": False}
    try:
        try:
            about["adapter"] = save_adapter(tuning, loaded.model, folder / "adapter", loaded.source)
        except UnsupportedModelError as error:
            about["adapter_not_written"] = str(error)
        try:
            tuning.fold()
        except UnsupportedModelError as error:
            about["model_not_written"] = str(error)
            return about
        loaded.model.save_pretrained(folder / "model")
        loaded.tokenizer.save_pretrained(folder / "model")
    except OSError as error:
        raise RunError(f"cannot write {folder}: {error}") from None
    about["model"] = True
    return about
