"""The base model of a run, loaded as its settings say."""

from __future__ import annotations

import torch

from fedsplit.config import RunConfig
from fedsplit.errors import check
from fedsplit.models.loading import LoadedModel, load
from fedsplit.models.positions import check_length
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
    # The fused kernel's backward is slow in bfloat16 on a CPU; plain attention of T x T is not.
    task = task_of(config)
    names = task.announced(m) if task.named else ()
    plain = m.autocast == "bfloat16" and m.device == "cpu" and m.max_tokens <= PLAIN_TOKENS
    loaded = load(
        m.name,
        m.task,
        attn="eager" if plain else None,
        num_labels=task.outputs,
        label_names=names or None,
        dtype=DTYPES[m.dtype],
        seed=derive_seed(config.seed, "head"),
        dropout=None if m.dropout < 0 else m.dropout,
        expected_sha256=m.sha256 or None,
    )
    _check_lengths(config, loaded)
    return loaded


def _check_lengths(config: RunConfig, loaded: LoadedModel) -> None:
    """Refuse lengths that the model or its tokenizer cannot have, before any owner is asked."""
    m, strategy = config.model, config.strategy
    if strategy == "offsite-tuning":
        check_length(loaded.model, config.offsite.block, "offsite.block")
        return
    check_length(loaded.model, m.max_tokens, "model.max-tokens")
    least = 2
    if task_of(config).labelled:
        least = loaded.tokenizer.num_special_tokens_to_add() + 1
    elif strategy == "serving":
        together = m.max_tokens + config.serving.new_tokens
        check_length(loaded.model, together, "model.max-tokens + serving.new-tokens")
    check(m.max_tokens >= least, "model.max-tokens", m.max_tokens, f">= {least} for {m.name}")
