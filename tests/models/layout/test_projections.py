"""Projections read from any family reproduce the block's own attention and FFN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModel

from fedsplit.errors import ModelError, UnsupportedModelError
from fedsplit.models.layout.projections import (
    BlockLayout,
    block_prefixes,
    embedding_name,
    layout_of,
    read_block,
    tensors_of,
)
from tests.models.families_for_projections import FAMILIES, family_config
from tests.tiny_models import random_model


def _model(name: str) -> tuple[nn.Module, BlockLayout]:
    config = family_config(name)
    own: dict[str, Any] = {"matrices": 0.15, "vectors": 0.3, "attn_implementation": "eager"}
    return random_model(config, AutoModel, seed=5, **own).double(), layout_of(config)


def _module(model: nn.Module, weight: str) -> nn.Module:
    return model.get_submodule(weight.rpartition(".")[0])


def _capture(model: nn.Module, names: dict[str, str], x: Tensor, **kwargs: Any) -> dict[str, Any]:
    """Inputs and outputs of named layers, and attention weights, in one forward."""
    seen: dict[str, Any] = {}

    def hook(role: str) -> Any:
        def inner(_m: nn.Module, args: Any, out: Any) -> None:
            seen[role] = (args[0].detach().clone()[0], out.detach().clone()[0])

        return inner

    handles = [_module(model, n).register_forward_hook(hook(role)) for role, n in names.items()]
    with torch.no_grad():
        out = model(inputs_embeds=x, output_attentions=True, **kwargs)
    for handle in handles:
        handle.remove()
    seen["attentions"] = out.attentions
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_unfolded_projections_give_values_and_hidden_units(family: str) -> None:
    model, layout = _model(family)
    names = dict(model.named_parameters())
    prefix = block_prefixes(layout, names)[-1]
    raw = read_block(layout, names, prefix, fold=False, dtype=torch.float64)
    roles = {r: prefix + s.weight for r, s in layout.sites().items()}
    width = model.get_input_embeddings().weight.shape[1]
    x = torch.randn(1, 1, width, dtype=torch.float64)

    seen = _capture(model, roles, x)

    value = seen["v"][0] @ raw.v.T + raw.biases.get("v", 0)  # (1, G*D)
    expanded = raw.expand(value.T).T  # (1, H*D): one token passes its value through
    torch.testing.assert_close(seen["o"][0].reshape(1, -1), expanded)
    torch.testing.assert_close(
        seen["o"][1].reshape(1, -1), expanded @ raw.o.T + raw.biases.get("o", 0)
    )
    torch.testing.assert_close(
        seen["down"][1].reshape(1, -1),
        seen["down"][0].reshape(1, -1) @ raw.down.T + raw.biases.get("down", 0),
    )
    up = seen["up"][0].reshape(1, -1) @ raw.up.T + raw.biases.get("up", 0)  # (1, I)
    hidden = seen["down"][0].reshape(1, -1)
    if raw.gate is None:
        own = seen["up"][1].reshape(1, -1)
        torch.testing.assert_close(up, own)
    else:  # hidden = act(gate) * up: the ratio must be the activation of the gate, elementwise
        gate = seen["gate"][0].reshape(1, -1) @ raw.gate.T + raw.biases.get("gate", 0)
        act = hidden / up
        candidates = [
            nn.functional.silu(gate),
            nn.functional.gelu(gate),
            nn.functional.gelu(gate, approximate="tanh"),
        ]
        assert min(float((act - c).abs().max()) for c in candidates) < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_folded_queries_and_keys_give_the_attention_logits(family: str) -> None:
    model, layout = _model(family)
    if layout.q_norm is not None or layout.k_norm is not None:
        pytest.skip("queries are normalised: logits are not bilinear in the input")
    names = dict(model.named_parameters())
    prefix = block_prefixes(layout, names)[-1]
    block = read_block(layout, names, prefix, dtype=torch.float64)
    width = model.get_input_embeddings().weight.shape[1]
    x = torch.randn(2, 1, 4, width, dtype=torch.float64)
    extra: dict[str, Any] = {}
    if hasattr(model, "rotary_emb") or family in ("gptj", "codegen", "modernbert"):
        extra["position_ids"] = torch.zeros(1, 4, dtype=torch.long)  # no rotation
    entry = prefix + layout.q.weight.rpartition(".")[0]
    norm = layout.attn_norm
    at = prefix + (norm.weight or "").rpartition(".")[0] if norm and norm.weight else None

    logits, predicted = [], []
    for sample in x:
        inputs: list[Tensor] = []
        module = model.get_submodule(at or entry)
        if norm is not None and norm.weight is None:  # a norm without parameters: find its input
            module = model.get_submodule(prefix[:-1])
        handle = module.register_forward_pre_hook(
            lambda _m, a, k, into=inputs: into.append(
                (a[0] if a else k["hidden_states"]).detach()[0]
            ),
            with_kwargs=True,
        )
        with torch.no_grad():
            out = model(inputs_embeds=sample, output_attentions=True, **extra)
        handle.remove()
        u = inputs[0].reshape(4, -1)
        if norm is not None:
            u = u - u.mean(-1, keepdim=True) if norm.kind == "layer" else u
            u = u / u.pow(2).mean(-1, keepdim=True).sqrt()
        q = u @ block.q.T + block.biases.get("q", 0)  # (T, H*D)
        k = block.expand((u @ block.k.T + block.biases.get("k", 0)).T).T
        q, k = (t.view(4, layout.heads, -1).transpose(0, 1) for t in (q, k))  # (H, T, D)
        predicted.append((q @ k.transpose(1, 2))[:, -1])  # last token sees all, (H, T)
        logits.append(out.attentions[-1][0, :, -1].log())

    def centred(t: Tensor) -> Tensor:
        return t - t.mean(-1, keepdim=True)

    # position terms (ALiBi) cancel between two inputs, softmax's constant by centring
    own, ours = centred(logits[0] - logits[1]), centred(predicted[0] - predicted[1])
    scale = (own * ours).sum() / (ours * ours).sum()
    torch.testing.assert_close(own, scale * ours, rtol=1e-3, atol=1e-4)
    assert float(own.abs().max()) > 1e-3


def test_the_layouts_are_the_families_real_ones() -> None:
    neox, gpt2, phi3 = (layout_of(family_config(f)) for f in ("gpt_neox", "gpt2", "phi3"))
    assert neox.q.rows is not None
    assert neox.q.rows[:8] == tuple(range(8))
    assert neox.q.rows[8] == 24  # head 1 starts after head 0's q, k and v
    assert gpt2.q.transposed
    assert gpt2.k.rows == tuple(range(32, 64))
    assert phi3.gate is not None
    assert phi3.gate.rows == tuple(range(48))
    assert layout_of(family_config("gemma")).attn_norm.offset == 1.0  # type: ignore[union-attr]
    assert layout_of(family_config("bert")).ffn_norm is None
    assert layout_of(family_config("olmo2")).attn_norm is None
    assert layout_of(family_config("bloom")).attn_norm.kind == "layer"  # type: ignore[union-attr]
    modern = layout_of(family_config("modernbert"))
    assert modern.optional == {"attn_norm.weight"}
    assert layout_of(family_config("falcon_40b")).kv_of_head == (0, 0, 1, 1)


def test_a_top_half_reads_without_embeddings() -> None:
    model, layout = _model("llama")
    top = {n: p for n, p in model.named_parameters() if n.startswith(("layers.1.", "norm"))}
    assert block_prefixes(layout, top) == ["layers.1."]
    assert embedding_name(layout, top) is None
    assert embedding_name(layout, dict(model.named_parameters())) == "embed_tokens.weight"


@pytest.mark.parametrize("kind", ["mamba", "deepseek_v3"])
def test_other_architectures_raise_with_what_was_found(kind: str) -> None:
    size = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
        "intermediate_size": 48,
        "vocab_size": 32,
        "num_key_value_heads": 4,
    }
    config = CONFIG_MAPPING[kind](**size)
    with pytest.raises(UnsupportedModelError, match="model_type="):
        layout_of(config)


def test_bad_tensors_are_named() -> None:
    model, layout = _model("llama")
    good = dict(model.named_parameters())
    name = "layers.1." + layout.v.weight
    with pytest.raises(ModelError, match=r"layers\.1\..*missing"):
        block_prefixes(layout, {n: p for n, p in good.items() if n != name})
    nan = dict(good) | {name: torch.full_like(good[name], float("nan"))}
    with pytest.raises(ModelError, match="NaN"):
        read_block(layout, nan, "layers.1.")
    with pytest.raises(ModelError, match="shape"):
        read_block(layout, dict(good) | {name: torch.zeros(3, 3)}, "layers.1.")


def test_adapters_are_merged_under_the_base_names() -> None:
    peft = pytest.importorskip("peft")
    model, layout = _model("llama")
    before = tensors_of(model)
    names = set(before)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    )
    after = tensors_of(wrapped)
    prefix = block_prefixes(layout, after)[0]
    key = prefix + layout.q.weight
    assert {n.removeprefix("base_model.model.") for n in after} == names
    assert not torch.equal(after[key], before["layers.0." + layout.q.weight])


@pytest.mark.parametrize("kind", ["lora", "ia3"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_merging_equals_the_adapter_librarys_own(kind: str, family: str) -> None:
    peft = pytest.importorskip("peft")
    model, layout = _model(family)
    linears = sorted({site.weight.split(".")[-2] for site in layout.sites().values()})
    last = layout.down.weight.split(".")[-2]
    if kind == "lora":
        config = peft.LoraConfig(target_modules=linears, r=2, init_lora_weights=False)
    else:
        config = peft.IA3Config(
            target_modules=linears, feedforward_modules=[last], init_ia3_weights=False
        )
    wrapped = peft.get_peft_model(model, config)
    ours = {n.removeprefix("base_model.model."): t for n, t in tensors_of(wrapped).items()}
    theirs = dict(wrapped.merge_and_unload().named_parameters())
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name].detach(), msg=name)
