"""Tiny bottoms of two blocks, and what crosses of texts behind them: shared by tests of attacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsplit.attacks import Public, View
from fedsplit.attacks.inversion.learned import represent
from fedsplit.models import load, split
from fedsplit.privacy import DChi, OwnerSecret, eta_from_ratio
from fedsplit.privacy.mechanisms.base import clip_rows
from tests.tiny_models import save_tiny_bert, save_tiny_llama

SAVE = {"bert": save_tiny_bert, "llama": save_tiny_llama}


def tiny_bottom(family: str, folder: Path) -> Any:
    """Return a classifier's bottom of two blocks of a row of :data:`SAVE`."""
    loaded = load(SAVE[family](folder), "sequence-classification", num_labels=3)
    return split(loaded.model, 2)[0].eval()


def seen(
    bottom: Any, public: list[Tensor], private: list[Tensor], ratio: float, clip: float = 0.0
) -> View:
    """Return what is received of private texts under d_chi noise of a ratio; 0 = clean rows."""
    clean = represent(bottom, private)
    law, rows = None, clean
    if ratio:
        norm = float(torch.cat(clean).norm(dim=1).median())
        law = DChi(eta_from_ratio(ratio, clean[0].shape[1], clip or norm), row_clip=clip)
        secret = OwnerSecret.for_simulation(0, "owner")
        rows = [law.privatise(clip_rows(x, clip), secret.stream(i)) for i, x in enumerate(clean)]
    return View(Public(bottom, law, [x.tolist() for x in public]), rows)
