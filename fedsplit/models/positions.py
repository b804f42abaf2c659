"""How many tokens a model has positions for, known before any text is read."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from fedsplit.errors import check

_NAME = re.compile(r"wpe|(?!.*relative).*position.*")


def learned_positions(model: nn.Module) -> int | None:
    """Return the longest text that a model's learned positions allow, tokens.

    A position beyond the last row of the table is an index error in the middle of a run.  Families
    that begin behind row 0 lose rows: behind the padding row (RoBERTa: 512 of 514), or by a fixed
    offset (OPT).

    Returns:
        The bound; None where nothing is looked up (rotary, ALiBi, relative positions).
    """
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and _NAME.fullmatch(name.rpartition(".")[2]):
            first = int(getattr(module, "offset", 0))
            if module.padding_idx is not None and not first:
                first = module.padding_idx + 1
            found.append(module.num_embeddings - first)
    return min(found, default=None)


def longest(model: Any) -> int:
    """Return how many positions a model has (2048 where nothing says it)."""
    learned = learned_positions(model)
    if learned is not None:
        return learned
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 1:
            return value
    return 2048


def check_length(model: nn.Module, tokens: int, setting: str) -> None:
    """Refuse a length for which a model has no positions.

    Raises:
        ConfigError: names the setting, its value and the bound.
    """
    most = learned_positions(model)
    check(most is None or tokens <= most, setting, tokens, f"<= {most}, the model's positions")
