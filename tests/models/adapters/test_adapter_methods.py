"""Methods inside chosen blocks: the identity at first, plugged in by name, folded; by family."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig

from fedsplit.errors import ConfigError, ModelError, UnsupportedModelError
from fedsplit.models.adapters.methods import METHODS, BlockTuning, MethodSettings
from fedsplit.models.anatomy import probe
from fedsplit.models.modes import keep_no_activations
from tests.tiny_models import random_model

COMMON: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GQA = COMMON | {"intermediate_size": 56, "num_key_value_heads": 2, "head_dim": 8}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-gqa": ("llama", GQA),
    "gpt2": ("gpt2", COMMON),
    "gpt_neox": ("gpt_neox", COMMON | {"intermediate_size": 56}),
    "opt": ("opt", COMMON | {"ffn_dim": 56, "word_embed_proj_dim": 32}),
    "bloom": ("bloom", COMMON),
    "qwen3": ("qwen3", GQA),
}
IDS = torch.arange(24).view(2, 12) * 7 % 58 + 3


def model_of(name: str) -> Any:
    kind, settings = FAMILIES[name]
    return random_model(AutoConfig.for_model(kind, **settings))


def attach(model: Any, method: str, positions: tuple[int, ...] = (1, 3), **own: Any) -> BlockTuning:
    anatomy = probe(model)
    blocks = {f"{anatomy.blocks_path}.{i}.": anatomy.blocks[i] for i in positions}
    return BlockTuning(model, blocks, MethodSettings(method, rank=3, width=5, prefix=4, **own))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(IDS, use_cache=False).logits
    return out


def train(model: Any, tuning: BlockTuning, steps: int = 3) -> None:
    optimizer = torch.optim.Adam(tuning.parameters(), lr=3e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        out = model(IDS, use_cache=False).logits
        F.cross_entropy(out[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
        optimizer.step()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_attaching_changes_no_output_and_training_only_what_is_named(
    name: str, method: str
) -> None:
    model = model_of(name)
    start = logits(model)
    rest = {n: p.clone() for n, p in model.named_parameters()}
    tuning = attach(model, method)
    assert torch.equal(logits(model), start)

    train(model, tuning)

    assert not torch.allclose(logits(model), start, atol=1e-4)
    mine = {id(p) for p in tuning.parameters()}
    assert all(n.startswith(tuple(tuning.blocks)) for n in tuning.named_parameters())
    for n, p in model.named_parameters():
        plain = n.replace(".base_layer.", ".")
        if id(p) not in mine and plain in rest:
            assert torch.equal(p, rest[plain]), n
    assert tuning.count() == sum(p.numel() for p in tuning.parameters())
    assert dict(model.named_parameters()).keys() >= tuning.named_parameters().keys()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_plugged_in_by_name_is_trained_there(name: str, method: str) -> None:
    one, other = model_of(name), model_of(name)
    tuning = attach(one, method)
    train(one, tuning)
    again = attach(other, method, seed=9)  # another start: the state brings its own
    again.load(tuning.state())
    assert torch.equal(logits(other), logits(one))


@pytest.mark.parametrize("name", FAMILIES)
def test_lora_folded_in_is_lora_beside(name: str) -> None:
    model = model_of(name)
    names = {n for n, _ in model.named_parameters()}
    before = {n: p.clone() for n, p in model.named_parameters()}
    tuning = attach(model, "lora")
    train(model, tuning)
    beside, dense = logits(model), tuning.dense(tuning.state())
    tuning.fold()
    torch.testing.assert_close(logits(model), beside, atol=1e-5, rtol=1e-5)
    now = dict(model.named_parameters())
    assert now.keys() == names
    changed = {n for n in names if not torch.equal(now[n], before[n])}
    assert changed == set(dense)
    for n, tensor in dense.items():
        torch.testing.assert_close(tensor, now[n], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", ["bottleneck", "prefix"])
def test_what_no_weight_can_stand_for_is_not_folded(method: str) -> None:
    tuning = attach(model_of("gpt2"), method)
    assert tuning.dense(tuning.state()) == {}
    with pytest.raises(UnsupportedModelError, match=method):
        tuning.fold()


def test_bitfit_trains_vectors_alone() -> None:
    for name, expected in (("gpt2", "attn.c_attn.bias"), ("llama-gqa", "input_layernorm.weight")):
        tuning = attach(model_of(name), "bitfit")
        assert all(p.dim() == 1 for p in tuning.parameters())
        assert any(n.endswith(expected) for n in tuning.named_parameters())


def test_sizes_are_as_set() -> None:
    model = model_of("llama-gqa")
    tuning = attach(copy.deepcopy(model), "lora")
    assert {p.shape[0] for n, p in tuning.named_parameters().items() if "lora_A" in n} == {3}
    tuning = attach(copy.deepcopy(model), "prefix", positions=(2,))
    assert {n.rpartition(".")[2]: tuple(p.shape) for n, p in tuning.named_parameters().items()} == {
        "keys": (2, 4, 8),
        "values": (2, 4, 8),
        "gate": (4,),
    }


def test_checkpointed_blocks_get_the_same_gradients() -> None:
    for method in METHODS:
        model = model_of("llama-gqa")
        tuning = attach(model, method)
        train(model, tuning)
        found = []
        for checkpointing in (False, True):
            if checkpointing:
                keep_no_activations(model)
                model.train()
            model.zero_grad()
            model(IDS, use_cache=False).logits.square().mean().backward()
            found.append([p.grad.clone() for p in tuning.parameters()])
        for plain, again in zip(*found, strict=True):
            torch.testing.assert_close(plain, again)


@pytest.mark.parametrize(
    ("change", "message"),
    [("missing", "missing"), ("extra", "unknown"), ("shape", "shape"), ("nan", "finite")],
)
@pytest.mark.parametrize("method", METHODS)
def test_a_state_that_does_not_fit_changes_nothing(method: str, change: str, message: str) -> None:
    model = model_of("llama-gqa")
    tuning = attach(model, method)
    state = {n: t + 1 for n, t in tuning.state().items()}
    name = sorted(state)[-1]
    if change == "missing":
        del state[name]
    elif change == "extra":
        state["model.layers.0.x"] = torch.zeros(1)
    elif change == "shape":
        state[name] = state[name][None]
    else:
        state[name].view(-1)[0] = float("nan")
    start = logits(model)
    with pytest.raises(ModelError, match=message):
        tuning.load(state)
    assert torch.equal(logits(model), start)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="zip"):
        attach(model_of("llama-gqa"), "zip")
    with pytest.raises(ConfigError, match="rank"):
        MethodSettings("lora", rank=0)
    model = model_of("llama-gqa")
    attach(model, "lora")
    with pytest.raises(ConfigError, match="already"):
        attach(model, "bottleneck")
