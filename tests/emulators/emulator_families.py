"""Tiny random decoders of several families, and the real material beside the repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedModel

from tests.tiny_models import random_model

SHARED = Path(__file__).parents[2].parent / "shared"
LAYERS = 6
VOCAB = 61
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_WIDE = _COMMON | {"intermediate_size": 56}
_GQA = _WIDE | {"num_key_value_heads": 2, "head_dim": 8}
_MIXED = ["sliding_attention", "full_attention"] * (LAYERS // 2)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GQA),
    "llama-tied": ("llama", _GQA | {"tie_word_embeddings": True}),
    "gpt2": ("gpt2", _COMMON | {"scale_attn_by_inverse_layer_idx": True}),
    "gpt_neox": ("gpt_neox", _WIDE),
    "opt": ("opt", _COMMON | {"ffn_dim": 56, "word_embed_proj_dim": 32, "layerdrop": 0.5}),
    "bloom": ("bloom", _COMMON),
    "falcon": ("falcon", _COMMON | {"alibi": False}),
    "phi3": ("phi3", _GQA),
    "qwen2": ("qwen2", _GQA),
    "gemma3": (
        "gemma3_text",
        _GQA | {"sliding_window": 3, "layer_types": _MIXED, "tie_word_embeddings": True},
    ),
    "gpt_neo": ("gpt_neo", _COMMON | {"attention_types": [[["global", "local"], LAYERS // 2]]}),
    "mixtral": ("mixtral", _GQA | {"num_local_experts": 3, "sliding_window": None}),
}
# Blocks that the layout probe does not know: no rank, no channels to choose there.
UNPROBED = {"mixtral"}


def tiny(name: str = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a random model in evaluation mode, weights drawn far from zero."""
    kind, settings = FAMILIES[name]
    config = AutoConfig.for_model(kind, **(settings | changes))
    model: PreTrainedModel = random_model(config, seed=seed, experts_implementation="eager")
    return model


def tokens(rows: int = 12, length: int = 10, seed: int = 1) -> torch.Tensor:
    """Return random ids (rows, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (rows, length), generator=generator)


def shared(*parts: str) -> Path:
    """Return a path in ../shared, or skip the test."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return path


def storages(model: torch.nn.Module) -> set[int]:
    """Return the addresses of all storages of parameters and buffers."""
    both = (*model.parameters(), *model.buffers())
    return {t.untyped_storage().data_ptr() for t in both if t.numel()}
