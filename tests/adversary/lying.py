"""The lying server of :mod:`simulations.adversary` as tests ask it: slots in, tensors out."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsplit.models.bundle.bottom import Bundle
from simulations.adversary import server as harness
from simulations.adversary.server import Taken, files_script, split_script
from simulations.adversary.victim import Victim

Answer = Callable[[list[int]], Tensor]
"""Slots of a step -> what the server says of them."""


class Owner(Victim):
    """A victim whose policy is given as TOML; empty: it has none."""

    def __init__(
        self, folder: Path, texts: Sequence[str], labels: Sequence[int], policy: str = ""
    ) -> None:
        super().__init__(folder, texts, labels, tomllib.loads(policy) or None)

    def ledger(self) -> list[dict[str, Any]]:
        """Return every line of its ledger."""
        return [json.loads(x) for x in (self.home / "ledger.jsonl").read_text().splitlines()]


class LyingServer(harness.LyingServer):
    """The suite's server, with the sessions that these tests ask for."""

    def split(
        self,
        owner: Owner,
        flat: Mapping[str, Any],
        bundle: Bundle,
        says: Answer,
        kind: str = "train",
        **offered: Any,
    ) -> Taken:
        """Ask for a split session, and answer its steps with whatever ``says`` returns."""
        script = split_script(bundle, lambda step: says(step.slots))
        return self.session(owner, flat, script, digest=bundle.digest, kind=kind, **offered)

    def emulator(
        self,
        owner: Owner,
        flat: Mapping[str, Any],
        files: Mapping[str, bytes],
        digest: str,
        **offered: Any,
    ) -> Taken:
        """Ask for a session of offsite tuning on an emulator's files."""
        return self.session(owner, flat, files_script(files), digest=digest, **offered)


def settings(**changes: Any) -> dict[str, Any]:
    """Return a run config, flat: ``group__key=value``, underscores for dashes."""
    usual = {"privacy__row_clip": "off", "train__batch_size": 8, "model__max_tokens": 40}
    return harness.settings(**(usual | changes))


def nearest_class(sent: Tensor, logits: Tensor) -> list[int]:
    """Read labels from gradients of a mean loss by known logits, as any server can."""
    residual = sent * len(sent) - torch.softmax(logits, 1)
    return [int(x) for x in residual.argmin(1)]
