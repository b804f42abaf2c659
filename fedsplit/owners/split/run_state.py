"""What an owner keeps of a run between messages: averaged weights, its own, its optimizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from fedsplit import storage

ROUNDS_KEPT = 3  # a server that was killed asks for its last round again


class RunState:
    """Files of one run in an owner's home.

    Args:
        folder: of the run.
        job_folder: of what outlives a restart of the server, which comes with a new run id.
    """

    def __init__(self, folder: Path, job_folder: Path) -> None:
        self.folder = folder
        self._job = job_folder

    # ---- weights that the server averaged ---------------------------------------------------

    def save_averaged(self, weights: Mapping[str, Tensor]) -> None:
        """Keep the averaged weights that a message brought: the next one may meet a new process."""
        storage.write_tensors(self._averaged, weights, durable=False)

    def averaged(self) -> dict[str, Tensor] | None:
        """Return the averaged weights, None where none have come."""
        return load_file(self._averaged) if self._averaged.exists() else None

    @property
    def _averaged(self) -> Path:
        return self.folder / "averaged.safetensors"

    # ---- weights that stay here --------------------------------------------------------------

    def save_own(self, weights: Mapping[str, Tensor], round_: int) -> None:
        """Keep the weights that were trained in a round and do not leave."""
        storage.write_tensors(self._job / f"own-{round_}.safetensors", weights, durable=False)
        self._drop_old("own")

    def own(self, through: int) -> dict[str, Tensor] | None:
        """Return the weights kept of the last round up to ``through``, None where there are none.

        A round that is asked for twice begins twice with the same weights.
        """
        rounds = [number for number in self._rounds("own") if number <= through]
        return load_file(self._job / f"own-{max(rounds)}.safetensors") if rounds else None

    # ---- optimizer of what the owner trains -------------------------------------------------

    def save_optimizer(self, optimizer: torch.optim.Optimizer | None, round_: int) -> None:
        """Keep an optimizer's state for the next message.

        Args:
            optimizer: None where nothing is trained.
            round_: that it has been stepped in.
        """
        if optimizer is None:
            return
        tensors = {}
        scalars: dict[str, float] = {}
        for index, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"{index}.{key}"] = value
                else:
                    scalars[f"{index}.{key}"] = float(value)
        path = self._job / f"optimizer-{round_}.safetensors"
        storage.write_tensors(path, tensors, {"scalars": json.dumps(scalars)}, durable=False)
        self._drop_old("optimizer")

    def load_optimizer(self, optimizer: torch.optim.Optimizer | None, before: int) -> None:
        """Restore the state kept of the last round before ``before``, if there is one.

        A round that is asked for twice, because the server was killed in it, begins twice with the
        same optimizer.
        """
        rounds = [number for number in self._rounds("optimizer") if number < before]
        if optimizer is None or not rounds:
            return
        state: dict[int, dict[str, Any]] = {}
        path = self._job / f"optimizer-{max(rounds)}.safetensors"
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  safe_open is no mapping
                index, _, key = name.partition(".")
                state.setdefault(int(index), {})[key] = file.get_tensor(name)
            for name, value in json.loads((file.metadata() or {}).get("scalars", "{}")).items():
                index, _, key = name.partition(".")
                state.setdefault(int(index), {})[key] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})

    def _rounds(self, kind: str) -> list[int]:
        """Return the rounds of which a file of that kind is kept."""
        names = [p.stem.partition("-")[2] for p in self._job.glob(f"{kind}-*.safetensors")]
        return [int(name) for name in names if name.isdecimal()]

    def _drop_old(self, kind: str) -> None:
        for old in sorted(self._rounds(kind))[:-ROUNDS_KEPT]:
            (self._job / f"{kind}-{old}.safetensors").unlink(missing_ok=True)
