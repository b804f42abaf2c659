"""Tiny random models of many families, for the tests in this folder (3 blocks, width 16)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from tests.tiny_models import random_model

LAYERS = 3
VOCAB = 37
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
ENCODER = COMMON | {"intermediate_size": 24}
DECODER = ENCODER | {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "head_dim": 4}
PLAIN = COMMON | {"bos_token_id": 1, "eos_token_id": 2}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 8, "num_experts": 4}
SLIDING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
CLASSIFY = {"sequence-classification": AutoModelForSequenceClassification}
TAG = {"token-classification": AutoModelForTokenClassification}
GENERATE = {"causal-lm": AutoModelForCausalLM}
BOTH = CLASSIFY | GENERATE


@dataclass(frozen=True)
class Family:
    """One family: its model_type, tasks and configuration.

    ``eager`` marks those without SDPA: transformers' eager attention gives NaN in float64 for rows
    padded on the left, so they are tested in float32.
    """

    model_type: str
    base: dict[str, Any]
    tasks: dict[str, Any]
    extra: dict[str, Any] = field(default_factory=dict)
    eager: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.eager else torch.float64


FAMILIES: dict[str, Family] = {
    "bert": Family("bert", ENCODER, CLASSIFY | TAG),
    "roberta": Family("roberta", ENCODER, CLASSIFY | TAG),
    "distilbert": Family("distilbert", COMMON, CLASSIFY | TAG, {"hidden_dim": 24}),
    "electra": Family("electra", ENCODER, CLASSIFY, {"embedding_size": 8}),
    "mpnet": Family("mpnet", ENCODER, CLASSIFY),
    "deberta": Family(
        "deberta", ENCODER, CLASSIFY, {"relative_attention": True, "pos_att_type": "c2p|p2c"}, True
    ),
    "deberta-v2": Family(
        "deberta-v2",
        ENCODER,
        CLASSIFY | TAG,
        {
            "relative_attention": True,
            "pos_att_type": "c2p|p2c",
            "position_buckets": 8,
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
        },
        True,
    ),
    "xlm-roberta": Family("xlm-roberta", ENCODER, CLASSIFY),
    "camembert": Family("camembert", ENCODER, CLASSIFY),
    "ernie": Family("ernie", ENCODER, CLASSIFY),
    "modernbert": Family(
        "modernbert",
        ENCODER,
        CLASSIFY | TAG,
        {"cls_token_id": 1, "sep_token_id": 2, "eos_token_id": 2, "bos_token_id": 1},
    ),
    "llama": Family("llama", DECODER, BOTH | TAG),
    "llama-tied": Family("llama", DECODER, GENERATE, {"tie_word_embeddings": True}),
    "gpt2": Family("gpt2", PLAIN, BOTH | TAG, {"scale_attn_by_inverse_layer_idx": True}),
    "gpt2-untied": Family("gpt2", PLAIN, GENERATE, {"tie_word_embeddings": False}),
    "gpt_bigcode": Family("gpt_bigcode", PLAIN, BOTH),
    "gpt_neo": Family(
        "gpt_neo", PLAIN, BOTH, {"attention_types": [[["global", "local", "global"], 1]]}, True
    ),
    "gpt_neox": Family("gpt_neox", PLAIN | {"intermediate_size": 24}, BOTH),
    "gptj": Family("gptj", PLAIN, BOTH, {"rotary_dim": 4}, True),
    "codegen": Family("codegen", PLAIN, GENERATE, {"rotary_dim": 4}, True),
    "opt": Family("opt", PLAIN, BOTH, {"ffn_dim": 24, "word_embed_proj_dim": 8, "layerdrop": 0.5}),
    "bloom": Family("bloom", PLAIN, BOTH | TAG, eager=True),
    "falcon-rotary": Family("falcon", PLAIN, BOTH, {"alibi": False}),
    "falcon-alibi": Family("falcon", PLAIN, BOTH, {"alibi": True}),
    "mpt": Family("mpt", PLAIN, BOTH, {"d_model": 16, "n_heads": 4, "n_layers": 3}, True),
    "mistral": Family("mistral", DECODER, BOTH, {"sliding_window": 3}),
    "mixtral": Family("mixtral", DECODER, BOTH, {"num_local_experts": 3, "sliding_window": None}),
    "qwen2": Family("qwen2", DECODER, BOTH),
    "qwen2_moe": Family(
        "qwen2_moe",
        DECODER,
        BOTH,
        MOE | {"shared_expert_intermediate_size": 8, "mlp_only_layers": [0]},
    ),
    "qwen3": Family(
        "qwen3", DECODER, BOTH, {"use_sliding_window": True, "sliding_window": 3} | SLIDING
    ),
    "qwen3_moe": Family("qwen3_moe", DECODER, BOTH, MOE),
    "olmoe": Family("olmoe", DECODER, GENERATE, MOE),
    "gemma": Family("gemma", DECODER, BOTH),
    "gemma2": Family("gemma2", DECODER, BOTH, {"sliding_window": 3}, True),
    "gemma3_text": Family("gemma3_text", DECODER, BOTH, {"sliding_window": 3} | SLIDING),
    "phi": Family("phi", DECODER, BOTH),
    "phi3": Family("phi3", DECODER, BOTH),
    "olmo": Family("olmo", DECODER, GENERATE),
    "olmo2": Family("olmo2", DECODER, BOTH),
    "stablelm": Family("stablelm", DECODER, BOTH),
    "starcoder2": Family("starcoder2", DECODER, BOTH),
    "granite": Family("granite", DECODER, GENERATE),
    "cohere": Family("cohere", DECODER, GENERATE),
    "cohere2": Family("cohere2", DECODER, GENERATE, {"sliding_window": 3} | SLIDING),
    "smollm3": Family("smollm3", DECODER, BOTH, {"no_rope_layers": [1, 0, 1]}),
    "glm": Family("glm", DECODER, BOTH),
    "helium": Family("helium", DECODER, BOTH),
    "nemotron": Family("nemotron", DECODER, BOTH),
    "biogpt": Family("biogpt", ENCODER | {"bos_token_id": 1, "eos_token_id": 2}, BOTH),
    "ernie4_5": Family("ernie4_5", DECODER, GENERATE),
}

CASES = [(name, task) for name, family in FAMILIES.items() for task in family.tasks]


def tiny(name: str, task: str, **changes: Any) -> PreTrainedModel:
    """Return a random model of a family, in evaluation mode, weights drawn far from zero."""
    family = FAMILIES[name]
    config = AutoConfig.for_model(family.model_type, **(family.base | family.extra | changes))
    if task != "causal-lm":
        config.num_labels = 3
    model = random_model(config, family.tasks[task], experts_implementation="eager")
    found: PreTrainedModel = model.to(family.dtype)
    return found


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask (3, 6): full, padded on the right, padded on the left."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (3, 6), generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]])
    return ids * mask, mask
