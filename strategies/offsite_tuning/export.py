"""What an offsite-tuning run writes: adapters after every round, exports at its end.

``adapters.safetensors`` holds the averaged adapters of the last accepted round; an interrupted run
goes on from ``state/`` (:mod:`strategies.rounds.run_checkpoint`).  At the end: ``adapter/`` (for
PEFT where it can express the method, see :mod:`fedsplit.models.adapters.files`) and ``model/``, the
plugged-in model as an ordinary Hugging Face folder (not for methods whose modules no Hugging Face
class has).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedsplit import storage
from fedsplit.errors import RunError, UnsupportedModelError
from fedsplit.models.adapters.files import save_adapter
from fedsplit.models.adapters.methods import BlockTuning, MethodSettings
from fedsplit.models.loading import LoadedModel

ADAPTERS = "adapters.safetensors"
FORMAT = "fedsplit-adapters-2"  # the first version named none
FIRST_VERSION = (ADAPTERS, "adapters.previous.safetensors", "averaging.safetensors")


def save_adapters(
    folder: Path, number: int, adapters: Mapping[str, Tensor], digest: str, settings: MethodSettings
) -> None:
    """Write the averaged adapters of a round, whole or not at all.

    Args:
        folder: of the run.
        number: the round.
        adapters: by name.
        digest: of the emulator that they belong to.
        settings: of their method.

    Raises:
        RunError: they cannot be written.
    """
    method = {k: v for k, v in asdict(settings).items() if k != "seed"}
    metadata = {
        "format": FORMAT,
        "round": str(number),
        "emulator": digest,
        "method": json.dumps(method, sort_keys=True),
    }
    try:
        storage.write_tensors(folder / ADAPTERS, adapters, metadata)
    except OSError as error:
        raise RunError(f"cannot write {folder / ADAPTERS}: {error}") from None


def refuse_first_version(folder: Path) -> None:
    """Refuse a folder where the first version left an interrupted or finished run.

    Raises:
        RunError: there are adapters without this version's format.
    """
    for path in (folder / name for name in FIRST_VERSION):
        if not path.exists():
            continue
        try:
            with safe_open(path, framework="pt") as file:
                found = (file.metadata() or {}).get("format")
        except (OSError, SafetensorError) as error:
            found = f"unreadable ({error})"
        if found != FORMAT:
            raise RunError(
                f"{path}: format {found}: must be {FORMAT}; a run of an earlier version cannot be "
                "gone on with: choose another output.dir, or remove the file to begin anew"
            )


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
