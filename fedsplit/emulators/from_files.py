"""An emulator straight from a checkpoint's files, one block of the base in memory at a time.

A base that is loaded and then compressed is held whole, in the dtype asked for, beside its
emulator.  Here its code is laid out without weights; what is outside the blocks is read once, each
block that the emulator holds is read, copied or compressed, and let go before the next.  The
emulator is the one that the loaded base would have given, bit for bit.

Only what looks at one block at a time can be built so: compressors that train, calibrate or settle
need a model that runs (:attr:`~fedsplit.emulators.compressors.base.Compressor.streams`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fedsplit.emulators.build import Emulator
from fedsplit.emulators.compressors.base import Compressor, Material
from fedsplit.emulators.importance.files import load_scores
from fedsplit.errors import check
from fedsplit.models.loading import describe, give_pad_token, set_dropout
from fedsplit.models.splitting.from_files import Skeleton


@dataclass(frozen=True)
class Built:
    """An emulator built from files.

    Attributes:
        emulator: owns all its storage.
        tokenizer: as :func:`fedsplit.models.loading.load` returns it.
        digest: the base's, see :func:`fedsplit.models.loading.weights_digest`.
    """

    emulator: Emulator
    tokenizer: Any
    digest: str


def build_from_files(
    name_or_path: str | Path,
    compressor: Compressor,
    *,
    scores: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    attn: str | None = None,
    dropout: float | None = None,
    expected_sha256: str | None = None,
) -> Built | None:
    """Return the emulator of a checkpoint, or None where the base must be loaded whole.

    Memory of the process's own: the emulator, what the base has outside its blocks, and one block.

    Args:
        name_or_path, dtype, attn, dropout, expected_sha256: see
            :func:`fedsplit.models.loading.load`.
        compressor: one that streams.
        scores: an importance run's ``importance.json``, for a compressor that ranks blocks; its
            harmonizers begin as identities.

    Raises:
        ConfigError: the compressor does not stream, or lacks scores.
        ModelError, UnsupportedModelError: see :func:`fedsplit.models.loading.load`; scores of
            another base.
    """
    bound = "one that looks at a block at a time: nothing trained, calibrated or settled"
    check(compressor.streams, "compressor", compressor.name, bound)
    found = describe(name_or_path, "causal-lm", {}, expected_sha256)
    base = Skeleton.of(found, dtype, attn)
    if base is None:
        return None
    digest = base.digest()
    base.fill(lambda place: place.block is None)
    give_pad_token(base.model, found.tokenizer, str(name_or_path))
    if dropout is not None:
        set_dropout(base.model, dropout)
    material = Material(base_digest=digest, read=base.block)
    if scores is not None:
        importance = load_scores(scores, base.model, base_digest=digest)
        material = replace(material, importance=importance)
    return Built(compressor.build(base.model, material), found.tokenizer, digest)
