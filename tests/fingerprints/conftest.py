"""Tiny random models and the real checkpoints beside the repository."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

from tests.tiny_models import random_model

SHARED = Path(__file__).parents[2].parent / "shared" / "models"

_COMMON: dict[str, Any] = {
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "intermediate_size": 80,
    "vocab_size": 160,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _COMMON | {"num_key_value_heads": 2}),
    "gpt2": (
        "gpt2",
        {
            "n_embd": 48,
            "n_head": 4,
            "n_layer": 3,
            "n_positions": 32,
            "vocab_size": 160,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gpt_neox": ("gpt_neox", _COMMON | {"rotary_pct": 0.5, "use_parallel_residual": True}),
    "opt": ("opt", _COMMON | {"ffn_dim": 80, "word_embed_proj_dim": 48, "pad_token_id": 0}),
    "bert": ("bert", _COMMON),
}


def build(family: str, seed: int = 0, **changes: Any) -> nn.Module:
    """A random model whose norms and biases are not trivial."""
    kind, settings = SHAPES[family]
    config = CONFIG_MAPPING[kind](**(settings | changes))
    auto = AutoModel if family == "bert" else AutoModelForCausalLM
    own = {"matrices": 0.05, "vectors": 0.2, "attn_implementation": "eager"}
    model: nn.Module = random_model(config, auto, seed=seed, **own)
    return model


@pytest.fixture(autouse=True)
def _same_draws() -> None:
    """Draws from torch's own generator do not depend on the tests that ran before."""
    torch.manual_seed(31)


@pytest.fixture
def tiny() -> Callable[..., nn.Module]:
    return build


@pytest.fixture
def checkpoint() -> Callable[[str], Path]:
    def find(name: str) -> Path:
        path = SHARED / name
        if not path.is_dir():
            pytest.skip(f"{path} is not here")
        return path

    return find
