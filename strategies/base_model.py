"""The base model of a run, loaded as its settings say."""

from __future__ import annotations

import torch

from fedsplit.config import RunConfig
from fedsplit.models.loading import LoadedModel, load
from fedsplit.seeding import derive_seed

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
AUTOCASTS = {"off": None, "bfloat16": torch.bfloat16}
PLAIN_TOKENS = 512


def load_base(config: RunConfig) -> LoadedModel:
    """Load the base model; the same for the server and a baseline.

    Raises:
        ModelError, UnsupportedModelError, ConfigError: see :func:`fedsplit.models.loading.load`.
    """
    m = config.model
    # The fused kernel's backward is slow in bfloat16 on a CPU; plain attention of T x T is not.
    plain = m.autocast == "bfloat16" and m.device == "cpu" and m.max_tokens <= PLAIN_TOKENS
    return load(
        m.name,
        m.task,
        attn="eager" if plain else None,
        num_labels=m.labels if m.task == "sequence-classification" else None,
        dtype=DTYPES[m.dtype],
        seed=derive_seed(config.seed, "head"),
        dropout=None if m.dropout < 0 else m.dropout,
        expected_sha256=m.sha256 or None,
    )
