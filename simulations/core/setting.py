"""What all cells of an experiment share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsplit.config import RunConfig
from fedsplit.models.loading import LoadedModel
from fedsplit.privacy.public_text import public_ids
from simulations.core.cells import CellStore
from strategies.base_model import load_base


@dataclass
class ExperimentSetting:
    """Settings, options and the base model of one experiment; kinds add what they share.

    Attributes:
        config: of the run.
        options: the kind's own options.
        folder: the run's, where what is expensive is kept; None: in memory alone.
        store: finished cells of the run.
    """

    config: RunConfig
    options: Mapping[str, Any]
    folder: Path | None = None
    store: CellStore = field(default_factory=lambda: CellStore(None, {}))

    @cached_property
    def loaded(self) -> LoadedModel:
        """The base model and its tokenizer."""
        return load_base(self.config)

    @property
    def data(self) -> str:
        """What rows call the owners' data: their file's or folder's name, or their kind."""
        return Path(self.config.data.path).stem or self.config.data.kind

    def token_ids(self, texts: Sequence[str]) -> list[Tensor]:
        """Return the texts' token ids (T_i,), cut at the run's ``model.max-tokens``."""
        ids = public_ids(self.loaded.tokenizer, texts, self.config.model.max_tokens)
        return [torch.tensor(row) for row in ids]
