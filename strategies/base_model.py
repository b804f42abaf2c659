"""The base model of a run, loaded as its settings say."""

from __future__ import annotations

from typing import Any

import torch

from fedsplit.config import RunConfig
from fedsplit.errors import check
from fedsplit.models.loading import LoadedModel, load
from fedsplit.models.positions import check_length
from fedsplit.models.splitting.from_files import ReadHalves, read_halves
from fedsplit.seeding import derive_seed
from fedsplit.tasks import task_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
AUTOCASTS = {"off": None, "bfloat16": torch.bfloat16}
PLAIN_TOKENS = 512


def load_base(config: RunConfig) -> LoadedModel:
    """Load the base model; the same for the server and a baseline.

    Raises:
        ModelError, UnsupportedModelError, ConfigError: see :func:`fedsplit.models.loading.load`.
        ConfigError: texts, blocks or continuations longer than the model's positions, or shorter
            than its special tokens and one more.
    """
    m = config.model
    loaded = load(m.name, m.task, seed=derive_seed(config.seed, "head"), **_how(config))
    _check_lengths(config, loaded.model, loaded.tokenizer)
    return loaded


def read_base(config: RunConfig, k: int) -> ReadHalves | None:
    """Return the base model's halves without its whole, or None where :func:`load_base` must be.

    Raises:
        ModelError, UnsupportedModelError, ConfigError: as :func:`load_base`, and see
            :func:`fedsplit.models.splitting.halves.split`.
    """
    read = read_halves(config.model.name, config.model.task, k, **_how(config))
    if read is not None:
        _check_lengths(config, read.bottom.model, read.tokenizer)
    return read


def _how(config: RunConfig) -> dict[str, Any]:
    m, task = config.model, task_of(config)
    # The fused kernel's backward is slow in bfloat16 on a CPU; plain attention of T x T is not.
    plain = m.autocast == "bfloat16" and m.device == "cpu" and m.max_tokens <= PLAIN_TOKENS
    names = task.announced(m) if task.named else ()
    return {
        "attn": "eager" if plain else None,
        "num_labels": task.outputs,
        "label_names": names or None,
        "dtype": DTYPES[m.dtype],
        "dropout": None if m.dropout < 0 else m.dropout,
        "expected_sha256": m.sha256 or None,
    }


def _check_lengths(config: RunConfig, model: Any, tokenizer: Any) -> None:
    """Refuse lengths that the model or its tokenizer cannot have, before any owner is asked."""
    m, strategy = config.model, config.strategy
    if strategy == "offsite-tuning":
        check_length(model, config.offsite.block, "offsite.block")
        return
    check_length(model, m.max_tokens, "model.max-tokens")
    least = 2
    if task_of(config).labelled:
        least = tokenizer.num_special_tokens_to_add() + 1
    elif strategy == "serving":
        together = m.max_tokens + config.serving.new_tokens
        check_length(model, together, "model.max-tokens + serving.new-tokens")
    check(m.max_tokens >= least, "model.max-tokens", m.max_tokens, f">= {least} for {m.name}")
