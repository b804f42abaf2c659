"""Exact search: every token of a causal model, at any depth, without noise; not with noise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from fedsplit.attacks import ExactSearch, score_tokens
from fedsplit.attacks.inversion.token_search import PrefixRunner
from fedsplit.errors import AttackError
from fedsplit.models import load, probe, split
from fedsplit.privacy import DChi, OwnerSecret, eta_from_ratio

V = 300
REAL = Path(__file__).parents[3].parent / "shared" / "models" / "gutenberg_llama_seed0"


def make_bottom(family: str, k: int) -> nn.Module:
    torch.manual_seed(0)
    if family == "gpt2":
        sizes = {"n_layer": 4, "n_embd": 32, "n_head": 2, "n_positions": 32}
        config = GPT2Config(vocab_size=V, bos_token_id=0, eos_token_id=0, **sizes)
        return split(GPT2LMHeadModel(config).eval(), k)[0]
    sizes = {"num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 48}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return split(LlamaForCausalLM(LlamaConfig(vocab_size=V, **sizes, **heads)).eval(), k)[0]


def transcript(bottom: nn.Module, vocab: int = V) -> tuple[list[Tensor], list[Tensor]]:
    g = torch.Generator().manual_seed(1)
    ids = [torch.randint(1, vocab, (n,), generator=g) for n in (6, 1, 8)]
    with torch.no_grad():
        return ids, [bottom(x[None], torch.ones_like(x[None]))[0] for x in ids]


@pytest.mark.parametrize(("family", "k"), [("gpt2", 3), ("gpt2", 0), ("llama", 1), ("llama", 3)])
def test_every_token_is_recovered(family: str, k: int):
    bottom = make_bottom(family, k)
    ids, hidden = transcript(bottom)
    attack = ExactSearch(chunk=32, guide_steps=5)

    found = attack.invert(hidden, bottom, probe(bottom.model).input_embeddings, V)

    assert score_tokens("exact", found, ids).success == 1.0
    assert attack.effort.exact == attack.effort.tokens == sum(map(len, ids))
    assert attack.effort.cached == (k > 0)
    assert found.top[0].shape == (6, 10)


def test_the_order_of_trials_saves_most_of_them():
    bottom = make_bottom("llama", 2)
    _, hidden = transcript(bottom)
    attack = ExactSearch(chunk=16, guide_steps=10)

    attack.invert(hidden, bottom, probe(bottom.model).input_embeddings, V)

    assert attack.effort.trials < 0.3 * V * attack.effort.tokens


def test_a_cached_prefix_changes_nothing():
    bottom = make_bottom("gpt2", 3)
    runner = PrefixRunner(bottom, probe(bottom.model).input_embeddings)
    assert runner.cached
    ids = torch.arange(50)
    runner.advance([5, 9, 2, 7])
    with torch.no_grad():
        cached = runner.tokens(ids)
        runner.cached = False
        runner.advance([5, 9, 2, 7])
        assert torch.allclose(cached, runner.tokens(ids), atol=1e-5)


def test_noise_ends_it():
    bottom = make_bottom("gpt2", 2)
    ids, hidden = transcript(bottom)
    norm = float(torch.cat(hidden).norm(dim=1).median())
    mechanism = DChi(eta_from_ratio(5.0, 32, norm))
    secret = OwnerSecret.for_simulation(0, "o")
    received = [mechanism.privatise(x, secret.stream(i)) for i, x in enumerate(hidden)]
    attack = ExactSearch(guide_steps=2)

    found = attack.invert(received, bottom, probe(bottom.model).input_embeddings, V)

    assert score_tokens("exact", found, ids).success < 0.5
    assert attack.effort.exact == 0


def test_a_budget_bounds_the_trials():
    bottom = make_bottom("llama", 1)
    _, hidden = transcript(bottom)
    attack = ExactSearch(max_trials=5, guide_steps=0, chunk=4)
    hidden = [torch.randn_like(x) for x in hidden]  # nothing reproduces these

    found = attack.invert(hidden, bottom, probe(bottom.model).input_embeddings, V)

    assert attack.effort.trials == 5 * attack.effort.tokens
    assert found.top[0].shape == (6, 10)


def test_a_model_that_reads_both_ways_is_refused():
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48}
    config = BertConfig(vocab_size=V, num_attention_heads=2, **sizes)
    bottom = split(BertForSequenceClassification(config).eval(), 1)[0]

    with pytest.raises(AttackError, match="causal models only"):
        ExactSearch().invert([torch.zeros(3, 32)], bottom, probe(bottom.model).input_embeddings, V)


@pytest.mark.skipif(not REAL.exists(), reason="needs the real checkpoint")
def test_a_real_checkpoint_gives_up_its_text():
    """Half of a trained 12-block LLaMA hides nothing (arXiv 2510.15511, theorem 3.1)."""
    loaded = load(REAL, "causal-lm")
    bottom = split(loaded.model, 6)[0]
    text = "The captain looked at the letter."
    ids = [torch.tensor(loaded.tokenizer(text)["input_ids"])]
    with torch.no_grad():
        hidden = [bottom(x[None], torch.ones_like(x[None]))[0] for x in ids]
    attack = ExactSearch()

    found = attack.invert(hidden, bottom, probe(bottom.model).input_embeddings, bottom.vocab)

    assert score_tokens("exact", found, ids).success == 1.0
    assert attack.effort.trials < 0.5 * bottom.vocab * attack.effort.tokens
