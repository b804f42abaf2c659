"""Importance runs, settled harmonizers and bounds in a folder, for experiments that share them.

What is found is what was made of the same: every key names the base (weights, head and settings),
the text, the schedule and this module's format.  Several processes may work in one folder: who
comes second waits, and reads what the first has made.  A run that was killed leaves a draft, which
nobody reads.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsplit.emulators.importance.files import Importance, load_importance, save_importance
from fedsplit.errors import ConfigError, FedsplitError
from fedsplit.models.anatomy import probe
from fedsplit.models.loading import LoadedModel
from fedsplit.storage import FileLock
from simulations.core.cells import CellStore

FORMAT = 1  # raise it when the same settings come to mean another computation
SECONDS = "seconds"  # the file that says how long it took
LOSSES = "losses.jsonl"


def base_facts(loaded: LoadedModel) -> dict[str, str]:
    """Return digests of all of a base: its trunk's weights, its head's, and its settings."""
    settings = {k: v for k, v in loaded.model.config.to_dict().items() if k != "_name_or_path"}
    head = getattr(probe(loaded.model).output_embeddings, "weight", None)
    return {
        "trunk": loaded.digest,
        "head": digest(head) if isinstance(head, Tensor) else "",
        "settings": _sha(json.dumps(settings, sort_keys=True, default=str).encode()),
    }


def digest(*tensors: Tensor) -> str:
    """Return the sha256 (hex) of tensors: types, shapes and bytes."""
    sha = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        sha.update(f"{flat.dtype}\0{tuple(tensor.shape)}\0".encode())
        sha.update(flat.view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


class Prepared:
    """A folder of them.

    Args:
        folder: made if need be.
        loaded: the base that they are of.

    Raises:
        ConfigError: the folder cannot be made or written.
    """

    def __init__(self, folder: Path, loaded: LoadedModel) -> None:
        self.folder, self.loaded = folder.expanduser(), loaded
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self.folder, os.W_OK):
                raise PermissionError(errno.EACCES, "no permission to write")
        except OSError as error:
            told = f"a folder to write in ({error.strerror})"
            raise ConfigError(f"options.prepared={str(folder)!r}: must be {told}") from None

    def importance(
        self, name: str, about: Mapping[str, Any], make: Callable[[], Importance]
    ) -> tuple[Importance, float]:
        """Return an importance run and the seconds that it took, made here or earlier.

        Args:
            name: starts its folder's name.
            about: all that it depends on; its digest ends the folder's name.
            make: makes it.
        """
        key = json.dumps({**about, "format": FORMAT}, sort_keys=True)
        where = self.folder / f"{name}-{_sha(key.encode())[:16]}"
        with FileLock(where.with_name(f".{where.name}.lock")) as lock:
            with suppress(FedsplitError, OSError, ValueError):
                seconds = float((where / SECONDS).read_text(encoding="utf-8"))
                found = load_importance(where, self.loaded.model, base_digest=self.loaded.digest)
                lock.path.unlink()
                return found, seconds
            began = time.perf_counter()
            made = make()
            seconds = time.perf_counter() - began
            draft = where.with_name(f".{where.name}.draft")
            for stale in (draft, where):  # a killed run's, and what could not be read
                shutil.rmtree(stale, ignore_errors=True)
            save_importance(made, draft)
            (draft / SECONDS).write_text(f"{seconds:.3f}\n", encoding="utf-8")
            draft.rename(where)
            lock.path.unlink()
            return made, seconds

    def losses(self, about: Mapping[str, Any]) -> CellStore:
        """Return the losses, by cell, of what depends on no emulator but on ``about``."""
        return CellStore(self.folder / LOSSES, {**about, "format": FORMAT})


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
