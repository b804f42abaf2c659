"""Blocks, embeddings and head are found by structure."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from fedsplit.errors import UnsupportedModelError
from fedsplit.models.anatomy import probe
from tests.models.split_families import CASES, LAYERS, VOCAB, tiny


@pytest.mark.parametrize(("name", "task"), list(dict(CASES).items()))
def test_every_family_is_located(name: str, task: str) -> None:
    model = tiny(name, task)
    anatomy = probe(model)
    assert (anatomy.num_layers, anatomy.hidden_size) == (LAYERS, 16)
    assert model.get_submodule(anatomy.blocks_path) is anatomy.blocks
    assert any(child is anatomy.blocks for child in anatomy.base.children())
    assert isinstance(anatomy.input_embeddings, nn.Embedding)
    assert anatomy.input_embeddings.num_embeddings == VOCAB
    assert (anatomy.output_embeddings is not None) == (task == "causal-lm")
    assert anatomy.tied == (
        anatomy.output_embeddings is not None
        and anatomy.output_embeddings.weight is anatomy.input_embeddings.weight
    )


def test_two_candidates_are_refused_and_listed() -> None:
    model = tiny("llama", "causal-lm")
    model.other = nn.ModuleList(nn.Linear(2, 2) for _ in range(LAYERS))
    with pytest.raises(UnsupportedModelError, match=r"found 2; .*model\.layers\[3\], other\[3\]"):
        probe(model)


def test_a_list_inside_a_block_does_not_count() -> None:
    model = tiny("llama", "causal-lm")
    model.model.layers[0].experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(LAYERS))
    assert probe(model).blocks_path == "model.layers"


def test_no_embedding_is_refused() -> None:
    config = AutoConfig.for_model(
        "llama", vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.get_input_embeddings = lambda: None  # type: ignore[method-assign]
    with pytest.raises(UnsupportedModelError, match="looked for a token embedding"):
        probe(model)
