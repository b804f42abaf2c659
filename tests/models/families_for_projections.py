"""Tiny random configurations of many families, as (name, config) pairs."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING

_D: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "vocab_size": 64,
    "max_position_embeddings": 32,
}
_GQA = _D | {"num_key_value_heads": 2}
_GPT = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 32, "vocab_size": 64}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GQA),
    "llama_bias": ("llama", _GQA | {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", _GQA | {"head_dim": 8}),
    "qwen2": ("qwen2", _GQA),
    "qwen3": ("qwen3", _GQA | {"head_dim": 16}),
    "gemma": ("gemma", _GQA | {"head_dim": 16}),
    "gemma2": ("gemma2", _GQA | {"head_dim": 16, "attn_logit_softcapping": None}),
    "gemma3": ("gemma3_text", _GQA | {"head_dim": 16}),
    "gpt2": ("gpt2", _GPT),
    "gptj": ("gptj", _GPT | {"rotary_dim": 4}),
    "gpt_neo": (
        "gpt_neo",
        {
            "hidden_size": 32,
            "num_heads": 4,
            "num_layers": 2,
            "attention_types": [[["global", "local"], 1]],
            "vocab_size": 64,
            "max_position_embeddings": 32,
        },
    ),
    "gpt_neox": ("gpt_neox", _D | {"rotary_pct": 0.5}),
    "gpt_bigcode": ("gpt_bigcode", _GPT | {"multi_query": True}),
    "gpt_bigcode_mha": ("gpt_bigcode", _GPT | {"multi_query": False}),
    "opt": ("opt", _D | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": ("bloom", {"hidden_size": 32, "n_head": 4, "n_layer": 2, "vocab_size": 64}),
    "falcon_7b": ("falcon", _D | {"multi_query": True, "parallel_attn": True}),
    "falcon_40b": (
        "falcon",
        _D | {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": False},
    ),
    "falcon_rw": (
        "falcon",
        _D | {"multi_query": False, "alibi": True, "parallel_attn": False, "bias": True},
    ),
    "mpt": ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 64}),
    "phi": ("phi", _D),
    "phi3": ("phi3", _GQA | {"pad_token_id": 0}),
    "olmo": ("olmo", _GQA),
    "olmo2": ("olmo2", _GQA),
    "stablelm": ("stablelm", _GQA),
    "starcoder2": ("starcoder2", _GQA),
    "codegen": ("codegen", _GPT | {"rotary_dim": 4}),
    "cohere": ("cohere", _GQA),
    "granite": ("granite", _GQA),
    "glm": ("glm", _GQA | {"head_dim": 8, "pad_token_id": 0}),
    "nemotron": ("nemotron", _GQA),
    "bert": ("bert", _D),
    "roberta": ("roberta", _D),
    "electra": ("electra", _D | {"embedding_size": 16}),
    "mpnet": ("mpnet", _D),
    "distilbert": (
        "distilbert",
        {"dim": 32, "n_heads": 4, "n_layers": 2, "hidden_dim": 48, "vocab_size": 64},
    ),
    "modernbert": ("modernbert", _D | {"pad_token_id": 0}),
}


def family_config(name: str) -> Any:
    kind, settings = FAMILIES[name]
    special = {"bos_token_id": 1, "eos_token_id": 2}
    return CONFIG_MAPPING[kind](**(special | settings))
