"""Forms, targets and dropout of LoRA inside blocks: identity, dense, folded, PEFT's own format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn import functional as F
from transformers import AutoConfig

from fedsplit.config.groups import LORA_FORMS
from fedsplit.errors import ConfigError
from fedsplit.models.adapters.files import save_adapter
from fedsplit.models.adapters.methods import BlockTuning, MethodSettings, check_method
from fedsplit.models.adapters.peft_folder import attach_peft
from fedsplit.models.anatomy import probe
from fedsplit.models.layout.projections import tensors_of
from tests.tiny_models import random_model

COMMON: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Linear layers, and GPT-2's Conv1D, whose weights are kept the other way round.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": COMMON | {"intermediate_size": 24, "num_key_value_heads": 1},
    "gpt2": COMMON | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
TARGETS = {"llama": "q_proj, down_proj", "gpt2": "c_attn,mlp.c_proj"}
IDS = torch.arange(24).view(2, 12) * 7 % 58 + 3
EACH = pytest.mark.parametrize(
    ("name", "form"), [(name, form) for name in FAMILIES for form in LORA_FORMS]
)


def model_of(name: str) -> Any:
    return random_model(AutoConfig.for_model(name, **FAMILIES[name]))


def attach(model: Any, **own: Any) -> BlockTuning:
    anatomy = probe(model)
    blocks = {f"{anatomy.blocks_path}.{i}.": anatomy.blocks[i] for i in (0, 2)}
    return BlockTuning(model, blocks, MethodSettings("lora", rank=3, lora_alpha=5.0, **own))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return out


def train(model: Any, tuning: BlockTuning) -> None:
    optimizer = torch.optim.Adam(tuning.parameters(), lr=3e-2)
    for _ in range(3):
        optimizer.zero_grad()
        out = model(IDS, use_cache=False).logits
        F.cross_entropy(out[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
        optimizer.step()


@EACH
def test_a_form_begins_as_the_identity_and_all_of_it_is_trained(name: str, form: str) -> None:
    model = model_of(name)
    start = logits(model)
    tuning = attach(model, lora_form=form)
    assert torch.equal(logits(model), start)
    before = tuning.state()
    train(model, tuning)
    assert not torch.allclose(logits(model), start, atol=1e-4)
    after = tuning.state()
    assert all(not torch.equal(after[n], before[n]) for n in before)
    assert any("magnitude" in n for n in before) is (form == "dora")


@EACH
def test_dense_is_the_folded_weight_and_what_a_fingerprint_reads(name: str, form: str) -> None:
    model = model_of(name)
    base = {n: p.clone() for n, p in model.named_parameters()}
    tuning = attach(model, lora_form=form)
    train(model, tuning)
    beside, dense, seen = logits(model), tuning.dense(tuning.state()), tensors_of(model)
    tuning.fold()
    folded = dict(model.named_parameters())
    assert folded.keys() == base.keys()
    torch.testing.assert_close(logits(model), beside, atol=1e-5, rtol=1e-5)
    assert dense.keys() == {n for n in base if not torch.equal(folded[n], base[n])}
    for n, made in dense.items():
        torch.testing.assert_close(made, folded[n], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(seen[n], folded[n], atol=1e-6, rtol=1e-5)


def test_the_forms_scale_as_they_say() -> None:
    found = {}
    for form in ("lora", "rslora"):
        model = model_of("llama")
        name = "model.layers.0.self_attn.q_proj.weight"
        weight = model.get_parameter(name)
        tuning = attach(model, lora_form=form)
        state = {n: torch.ones_like(t) for n, t in tuning.state().items()}
        found[form] = float((tuning.dense(state)[name] - weight).mean())
    # Ones times ones over rank 3 are 3: times alpha over the rank, or over its root.
    assert found["lora"] == pytest.approx(3 * 5.0 / 3, rel=1e-4)
    assert found["rslora"] == pytest.approx(3 * 5.0 / 3**0.5, rel=1e-4)


def test_the_rows_of_dora_have_the_trained_norms() -> None:
    tuning = attach(model_of("llama"), lora_form="dora")
    state = {n: t + 0.1 for n, t in tuning.state().items()}
    for name, made in tuning.dense(state).items():
        wanted = state[name.removesuffix("weight") + "lora_magnitude_vector.default.weight"]
        torch.testing.assert_close(made.norm(dim=1), wanted, atol=1e-5, rtol=1e-5)


@EACH
def test_peft_loads_what_is_written(name: str, form: str, tmp_path: Path) -> None:
    own = {"lora_form": form, "lora_dropout": 0.25, "lora_targets": TARGETS[name]}
    model = model_of(name)
    tuning = attach(model, **own)
    train(model.train(), tuning)
    expected = logits(model.eval())
    assert save_adapter(tuning, model, tmp_path, "base") == "peft"
    for load in (PeftModel.from_pretrained, attach_peft):
        loaded = load(model_of(name), str(tmp_path))
        torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-5)
    config = loaded.peft_config["default"]
    assert config.lora_dropout == 0.25
    assert (config.use_rslora, config.use_dora) == (form == "rslora", form == "dora")


@pytest.mark.parametrize("name", FAMILIES)
def test_targets_restrict_what_is_trained(name: str) -> None:
    ends = tuple(part.strip() for part in TARGETS[name].split(","))
    chosen = attach(model_of(name), lora_targets=TARGETS[name])
    layers = {n.partition(".lora_")[0] for n in chosen.named_parameters()}
    assert len(layers) == 4  # two in each block
    assert all(layer.endswith(ends) for layer in layers)
    assert chosen.count() < attach(model_of(name)).count()


def test_a_target_that_no_block_has_is_refused_with_the_known_names() -> None:
    known = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    told = rf"^offsite\.lora-targets='query': must be among {known}$"
    model = model_of("llama")
    with pytest.raises(ConfigError, match=told):
        attach(model, lora_targets="q_proj,query")
    with pytest.raises(ConfigError, match=told):
        check_method(probe(model).blocks, MethodSettings("lora", lora_targets="query"))
    assert not any("lora" in n for n, _ in model.named_parameters())


def test_dropout_acts_in_training_mode_alone() -> None:
    model = model_of("llama")
    tuning = attach(model, lora_dropout=0.5)
    train(model, tuning)
    assert torch.equal(logits(model), logits(model))  # as attached: the block's own mode
    still = logits(model)
    assert not torch.equal(logits(model.train()), logits(model))
    assert torch.equal(logits(model.eval()), still)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"lora_dropout": 1.0}, "lora_dropout=1.0"),
        ({"lora_form": "qlora"}, "lora_form='qlora'"),
        ({"lora_targets": 3}, "lora_targets=3"),
    ],
)
def test_settings_out_of_range_are_refused(own: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MethodSettings("lora", **own)
