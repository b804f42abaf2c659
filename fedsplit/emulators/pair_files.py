"""An importance run on disk: scores, harmonizers and optimiser as safetensors, the rest as JSON."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedsplit import storage
from fedsplit.errors import ModelError
from fedsplit.models.bundle.bounded_json import dump_json, parse_json

MAX_JSON = 1 << 24


def check_disk(path: Path, need: int) -> None:
    """Raise unless the disk that will hold ``path`` (its parent exists) has ``need`` bytes left.

    Raises:
        ModelError: names both numbers.
    """
    free = shutil.disk_usage(path.parent).free
    if need > free:
        raise ModelError(f"{path}: needs {need} bytes: must be <= {free}, what the disk has left")


def write_pair(folder: Path, name: str, tensors: Mapping[str, Tensor], about: Any) -> None:
    """Write ``name.safetensors`` and ``name.json`` so that a crash leaves the old pair readable.

    The JSON carries the step, and so does the tensor file's metadata: :func:`read_pair` refuses a
    pair whose halves differ.

    Raises:
        ModelError: if the disk is too full or the folder cannot be written.
    """
    try:
        _write(folder, name, tensors, about)
    except OSError as error:
        raise ModelError(f"{folder / name}: cannot be written: {error}") from error


def _write(folder: Path, name: str, tensors: Mapping[str, Tensor], about: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    check_disk(folder / name, sum(t.numel() * t.element_size() for t in tensors.values()))
    step = str(about["step"])
    weights = folder / f"{name}.{step}.safetensors"
    storage.write_tensors(weights, tensors, {"step": step}, durable=False)
    # The moment from which the new pair counts.
    storage.write(folder / f"{name}.json", dump_json(about), durable=False)
    for old in folder.glob(f"{name}.*.safetensors"):
        if old != weights:
            os.unlink(old)


def read_pair(folder: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`write_pair` wrote.

    Raises:
        ModelError: if a file is missing, too large, damaged, or the two are of different steps.
    """
    path = folder / f"{name}.json"
    if not path.is_file() or path.stat().st_size > MAX_JSON:
        raise ModelError(f"{path}: must be a file of at most {MAX_JSON} bytes")
    about = parse_json(path.name, path.read_bytes())
    step = about.get("step")
    if type(step) is not int or step < 0:
        raise ModelError(f"{path}: step={step!r}: must be an integer >= 0")
    weights = folder / f"{name}.{step}.safetensors"
    if not weights.is_file():
        raise ModelError(f"{weights}: must be there beside {path.name}")
    try:
        opened: Any = safe_open(str(weights), framework="pt", device="cpu")
        with opened as handle:
            if (handle.metadata() or {}).get("step") != str(step):
                raise ModelError(f"{weights}: metadata step: must be {step}")
            tensors = {key: handle.get_tensor(key) for key in list(handle.keys())}
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ModelError(f"{weights}: not a readable safetensors file: {error}") from error
    for key, tensor in tensors.items():
        if tensor.ndim > 16:  # PyTorch reads more than 64 and then fails to compute with them
            raise ModelError(f"{weights}: {key}: {tensor.ndim} axes: must be <= 16")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ModelError(f"{weights}: {key}: must be finite")
    return tensors, about
