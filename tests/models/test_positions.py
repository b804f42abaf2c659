"""The bound on a text's length is the model's own: one token more is an index error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

from fedsplit.errors import ConfigError
from fedsplit.models.positions import check_length, learned_positions, longest

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 20,
    "max_position_embeddings": 14,
}
FAMILIES: dict[str, tuple[Any, int]] = {
    "bert": (BertConfig(**SMALL), 14),
    "roberta": (RobertaConfig(**SMALL, pad_token_id=1), 12),
    "xlm-roberta": (XLMRobertaConfig(**SMALL, pad_token_id=1), 12),
    "gpt2": (GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=14, vocab_size=20), 14),
    "opt": (OPTConfig(**SMALL, ffn_dim=16, word_embed_proj_dim=16), 14),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bound_is_met_and_not_passed(family: str) -> None:
    config, bound = FAMILIES[family]
    model = AutoModel.from_config(config).eval()
    assert learned_positions(model) == longest(model) == bound
    check_length(model, bound, "model.max-tokens")
    with pytest.raises(ConfigError, match=rf"model.max-tokens={bound + 1}: must be <= {bound}"):
        check_length(model, bound + 1, "model.max-tokens")
    ids = torch.full((1, bound), 7)
    with torch.no_grad():
        model(input_ids=ids)
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, bound + 1), 7))


def test_rotary_positions_have_no_table() -> None:
    model = AutoModel.from_config(LlamaConfig(**SMALL, num_key_value_heads=2))
    assert learned_positions(model) is None
    assert longest(model) == 14
    check_length(model, 10**6, "model.max-tokens")
