"""The gate after an aggregate: verdicts, localisation and incremental checks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fedsplit.errors import ConfigError, LineageError, ModelError
from fedsplit.fingerprints.evasion.transforms import transform
from fedsplit.fingerprints.gate.lineage_gate import GateConfig, LineageGate
from fedsplit.fingerprints.view import WeightView

Tiny = Callable[..., Any]


def _nudged(model: nn.Module, size: float = 0.01) -> nn.Module:
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(size * p.std() * torch.randn(p.shape, generator=generator))
    return other


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt", "bert"])
def test_verdicts_for_same_trained_and_foreign(tiny: Tiny, family: str) -> None:
    base = tiny(family)
    gate = LineageGate(base)

    same, trained, foreign = (gate.check(m) for m in (base, _nudged(base), tiny(family, seed=9)))

    assert same.verdict == "in_lineage"
    assert same.score == pytest.approx(1.0, abs=1e-5)
    assert same.pcs == pytest.approx(1.0)
    assert same.ics == pytest.approx(1.0, abs=1e-5)
    assert trained.verdict == "in_lineage"
    assert 0.95 < trained.score < 1.0
    assert foreign.verdict == "independent"
    assert abs(foreign.score) < 0.1


def test_base_is_kept_when_the_live_model_trains_on(tiny: Tiny) -> None:
    model = tiny("llama")
    gate = LineageGate(model)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p))
    assert gate.check(model).verdict == "independent"


def test_spliced_block_is_named(tiny: Tiny) -> None:
    base, foreign = tiny("llama"), tiny("llama", seed=4)
    gate = LineageGate(base)
    suspect = copy.deepcopy(base)
    suspect.model.layers[1] = foreign.model.layers[1]
    report = gate.check(suspect)
    assert report.verdict == "not_shown"
    assert report.diverged == (1,)
    assert [p > 0.99 for p in report.pcs_per_layer] == [True, False, True]


@pytest.mark.parametrize("name", ["ffn_permutation", "vo_maps", "qk_maps", "rotation"])
def test_an_equivalent_block_in_another_basis_is_told_from_training(tiny: Tiny, name: str) -> None:
    base = tiny("llama")
    gate = LineageGate(base)
    equivalent = gate.check(transform(base, name).model)
    assert equivalent.verdict == "in_lineage"
    assert equivalent.moved == (0, 1, 2)
    for size in (0.01, 0.1, 0.3):
        assert gate.check(_nudged(base, size)).moved == ()
    lora = copy.deepcopy(base)  # one matrix trained hard, the others left
    with torch.no_grad():
        weight = lora.model.layers[1].self_attn.q_proj.weight
        weight.add_(0.5 * weight.std() * torch.randn(weight.shape))
    assert gate.check(lora).moved == ()


def test_noise_of_the_right_norm_is_not_in_lineage(tiny: Tiny) -> None:
    base = tiny("llama")
    gate = LineageGate(base)
    state = {
        n: torch.randn_like(p) * p.std() if p.dim() > 1 else p.detach()
        for n, p in base.named_parameters()
    }
    assert gate.check(state).verdict == "independent"


def test_incremental_check_reads_only_what_changed(tiny: Tiny) -> None:
    base = tiny("llama")
    gate = LineageGate(base)
    first = gate.check(base)
    assert first.recomputed == 3
    changed = "model.layers.0.self_attn.v_proj.weight"
    state = {n: p.detach().clone() for n, p in base.named_parameters()}
    state[changed] = state[changed] + 0.02 * torch.randn_like(state[changed])
    read: list[str] = []

    view = WeightView.of_tensors(state, base.config)
    plain = view.get
    view.get = lambda name: (read.append(name), plain(name))[1]  # type: ignore[method-assign]
    report = gate.check(view, {"top." + changed})

    assert report.recomputed == 1
    assert not any("layers.1" in n or "layers.2" in n or "embed" in n for n in read)
    full = LineageGate(base).check(state)
    assert report.score == pytest.approx(full.score)
    assert report.pcs == pytest.approx(full.pcs)
    assert report.ics == pytest.approx(full.ics)


def test_uncommitted_check_leaves_no_trace(tiny: Tiny) -> None:
    base, foreign = tiny("llama"), tiny("llama", seed=5)
    gate = LineageGate(base)
    gate.check(base)
    assert gate.check(foreign, commit=False).verdict == "independent"
    assert gate.check(base, set()).verdict == "in_lineage"


def test_a_top_with_the_servers_embedding_rows(tiny: Tiny) -> None:
    base = tiny("llama")
    rows = base.get_input_embeddings().weight.detach()
    top = {
        n.replace("layers.2", "layers.1").replace("layers.1.", "layers.1.")
        if "layers.2" in n
        else n.replace("layers.1", "layers.0"): p.detach()
        for n, p in base.named_parameters()
        if "layers.0" not in n and "embed" not in n
    }
    gate = LineageGate(top, model_config=base.config, rows=rows)
    report = gate.check(top)
    assert report.verdict == "in_lineage"
    assert report.ics == pytest.approx(1.0, abs=1e-5)
    assert len(report.per_layer) == 2
    without = LineageGate(top, model_config=base.config)
    assert without.check(top).ics is None


def test_sketch_agrees_with_the_exact_products(tiny: Tiny) -> None:
    base = tiny("llama", hidden_size=128, num_attention_heads=4, intermediate_size=160)
    suspect = _nudged(base, 0.3)
    exact = LineageGate(base, GateConfig(sketch=4096)).check(suspect)
    sketched = LineageGate(base, GateConfig(sketch=32)).check(suspect)
    assert sketched.score == pytest.approx(exact.score, abs=0.03)


def test_adapters_are_seen(tiny: Tiny) -> None:
    peft = pytest.importorskip("peft")
    base = tiny("llama")
    gate = LineageGate(base)
    gate.check(base)
    lora = peft.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(copy.deepcopy(base), lora)
    names = [n for n, _ in wrapped.named_parameters() if ".lora_" in n and "layers.1" in n]
    report = gate.check(wrapped, names)
    assert report.recomputed == 1
    assert report.per_layer[1] < report.per_layer[0] == pytest.approx(1.0)


def test_bad_states_are_named(tiny: Tiny) -> None:
    base = tiny("llama")
    gate = LineageGate(base)
    state = {n: p.detach() for n, p in base.named_parameters()}
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(ModelError, match=r"up_proj.*NaN"):
        gate.check(state | {name: torch.full_like(state[name], float("nan"))})
    final = "model.norm.weight"
    with pytest.raises(ModelError, match=r"model\.norm.*NaN"):
        gate.check(state | {final: torch.full_like(state[final], float("nan"))})
    with pytest.raises(ModelError, match="missing"):
        gate.check({n: p for n, p in state.items() if n != name})
    with pytest.raises(ModelError, match="shape"):
        gate.check(state | {name: state[name][:, :8]})
    with pytest.raises(LineageError, match="blocks=2"):
        gate.check({n: p for n, p in state.items() if "layers.2" not in n})
    with pytest.raises(LineageError, match="width=32"):
        gate.check(tiny("llama", hidden_size=32))
    with pytest.raises(ConfigError, match="in_lineage"):
        GateConfig(in_lineage=1.5)


def test_the_models_own_top_half(tiny: Tiny) -> None:
    from fedsplit.models import split

    base = tiny("llama")
    rows = base.get_input_embeddings().weight.detach().clone()
    _, top = split(base, 1)
    gate = LineageGate(top, rows=rows)
    with torch.no_grad():
        for p in top.parameters():
            p.add_(0.01 * p.std() * torch.randn_like(p))
    report = gate.check(top)
    assert report.verdict == "in_lineage"
    assert len(report.per_layer) == 2
    assert report.ics is not None
    assert 0.9 < report.ics < 1.0
