"""Parameter cosine and HuRef's invariants."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsplit.errors import LineageError, ModelError
from fedsplit.fingerprints.methods.ics import ICS, Factors, PublishedICS, correlation
from fedsplit.fingerprints.methods.pcs import PCS, moments
from fedsplit.fingerprints.view import WeightView, choose_tokens

Tiny = Callable[..., Any]


def _view(model: Any) -> WeightView:
    return WeightView.of_module(model)


def test_pcs_equals_the_cosine_of_the_flattened_matrices(tiny: Tiny) -> None:
    one, two = tiny("llama"), tiny("llama", seed=1)
    with torch.no_grad():
        for p, q in zip(one.parameters(), two.parameters(), strict=True):
            q.lerp_(p, 0.5)
    flat = [
        torch.cat([p.detach().flatten().double() for p in m.parameters() if p.dim() > 1])
        for m in (one, two)
    ]
    expected = torch.nn.functional.cosine_similarity(flat[0], flat[1], dim=0)
    assert PCS().compare(_view(one), _view(two)).value == pytest.approx(float(expected))


def test_norm_vectors_make_strangers_look_alike(tiny: Tiny) -> None:
    one, two = _view(tiny("llama")), _view(tiny("llama", seed=1))
    assert abs(PCS().compare(one, two).value) < 0.02
    assert PCS(vectors=True).compare(one, two).value > 0.1


def test_pcs_reads_an_extended_vocabulary_and_a_wrapped_model(tiny: Tiny) -> None:
    base = tiny("llama")
    longer = copy.deepcopy(base)
    longer.resize_token_embeddings(180)
    wrapped = {f"base_model.model.{n}": p for n, p in longer.named_parameters()}
    view = WeightView.of_tensors(wrapped, base.config)
    assert PCS().compare(_view(base), view).value == pytest.approx(1.0)


def test_renamed_parameters_and_nan_are_named(tiny: Tiny) -> None:
    base = tiny("gpt2")
    state = {n: p.detach() for n, p in base.named_parameters()}
    bad = state | {"transformer.h.0.mlp.c_fc.weight": torch.full((48, 192), float("inf"))}
    with pytest.raises(ModelError, match=r"c_fc\.weight.*NaN or infinite"):
        PCS().compare(_view(base), WeightView.of_tensors(bad, base.config))
    renamed = {n.replace("h.", "odd."): p for n, p in state.items()}
    renamed = {n.replace("c_attn", "qkv"): p for n, p in renamed.items()}
    with pytest.raises(ModelError, match=r"none is '<block>\.attn\.c_attn\.weight'"):
        WeightView.of_tensors(renamed, base.config)
    with pytest.raises(LineageError, match="shape"):
        moments(torch.ones(3, 2), torch.ones(3, 4))


def test_correlation_through_factors_equals_the_dense_one() -> None:
    torch.manual_seed(0)
    one = Factors(torch.randn(60, 7) + 1, torch.randn(60, 7))
    two = Factors(torch.randn(60, 5) + one.left[:, :5], torch.randn(60, 5))
    stacked = torch.stack([one.matrix().flatten(), two.matrix().flatten()])
    assert correlation(one, two) == pytest.approx(float(torch.corrcoef(stacked)[0, 1]), abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt", "bert"])
def test_ics_equals_the_cosine_of_its_channels(tiny: Tiny, family: str) -> None:
    base = tiny(family)
    other = tiny(family, seed=2)
    with torch.no_grad():
        for p, q in zip(base.parameters(), other.parameters(), strict=True):
            q.lerp_(p, 0.6)
    tokens = choose_tokens(160, 64)
    a, b = (ICS().channels(_view(m), tokens) for m in (base, other))
    assert a.shape == (6, 64, 64)
    dense = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)
    exact = ICS().compare(_view(base), _view(other), tokens)
    assert exact.value == pytest.approx(float(dense), abs=1e-4)
    assert set(exact.parts) == {"a-2", "b-2", "f-2", "a-1", "b-1", "f-1"}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_multiplying_in_bfloat16_keeps_the_similarity(
    tiny: Tiny, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsplit.fingerprints.methods.ics.fast_bf16", lambda: True)
    base, whole, other = tiny(family).bfloat16(), tiny(family), tiny(family, seed=2)
    with torch.no_grad():
        for p, q in zip(whole.parameters(), other.parameters(), strict=True):
            q.lerp_(p, 0.6)
    for suspect in (base, whole, other, copy.deepcopy(other).bfloat16()):
        views = _view(base), _view(suspect)
        short, exact = (ICS(bf16=b).compare(*views) for b in (True, False))
        assert short.value == pytest.approx(exact.value, abs=1e-3)
    assert next(ICS().factors(_view(base), range(9)))[1].left.dtype == torch.bfloat16
    assert next(ICS().factors(_view(whole), range(9)))[1].left.dtype == torch.float32


def test_independent_random_models_are_near_zero_and_widths_may_differ(tiny: Tiny) -> None:
    one, two = _view(tiny("llama")), _view(tiny("llama", seed=1, hidden_size=64))
    assert abs(ICS().compare(one, two).value) < 0.15


def test_token_lists_are_fixed_and_bounded(tiny: Tiny) -> None:
    assert choose_tokens(50_000) == choose_tokens(50_000)
    assert len(choose_tokens(50_000)) == 4096
    assert choose_tokens(10) == tuple(range(10))
    view = _view(tiny("llama"))
    with pytest.raises(LineageError, match=r"tokens=2 in \[3, 999\].*160"):
        view.embeddings([3, 999])


@pytest.mark.parametrize("seed", [0, 1])
def test_the_gutenberg_twins_fool_ics_but_not_pcs(
    checkpoint: Callable[[str], Path], seed: int
) -> None:
    from transformers import AutoModelForCausalLM

    views = [
        _view(AutoModelForCausalLM.from_pretrained(checkpoint(f"gutenberg_llama_seed{s}")))
        for s in (seed, 1 - seed)
    ]
    tokens = choose_tokens(4096, 1024)
    assert ICS().compare(*views, tokens).value > 0.5
    assert PublishedICS().compare(*views, tokens).value > 0.2
    assert abs(PCS().compare(*views).value) < 0.01


def test_a_suspect_with_fewer_tokens_is_compared_on_the_shared_ones(tiny: Tiny) -> None:
    base, small = tiny("llama"), tiny("llama", vocab_size=90)
    found = ICS().compare(_view(base), _view(small))
    assert abs(found.value) < 0.3
    with pytest.raises(LineageError, match="tokens="):
        ICS().compare(_view(base), _view(small), choose_tokens(160))
