"""Mixtures of experts: one FFN whose hidden units come in groups."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING

from fedsplit.errors import ModelError, UnsupportedModelError
from fedsplit.fingerprints import FINGERPRINTS, WeightView
from fedsplit.fingerprints.evasion.transforms import transform
from fedsplit.fingerprints.weights_file import open_view
from fedsplit.models.layout.projections import layout_of
from tests.tiny_models import random_model

EXPERTS = 3
SETTINGS: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "moe_intermediate_size": 48,
    "vocab_size": 96,
    "num_local_experts": EXPERTS,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
KINDS = ["mixtral", "olmoe", "qwen3_moe"]


def build(kind: str, seed: int = 0) -> Any:
    own: dict[str, Any] = {"matrices": 0.05, "vectors": 0.05, "experts_implementation": "eager"}
    return random_model(CONFIG_MAPPING[kind](**SETTINGS), seed=seed, **own)


@pytest.mark.parametrize("kind", KINDS)
def test_expert_units_are_up_gate_and_down(kind: str) -> None:
    model = build(kind)
    view = WeightView.of_module(model)
    block = view.block(-1, fold=False)
    assert block.up.shape == (EXPERTS * 48, 32)
    assert block.down.shape == (32, EXPERTS * 48)
    assert block.gate is not None
    x = torch.randn(1, 32)
    experts = model.model.layers[-1].mlp.experts
    for index in range(EXPERTS):
        rows = slice(48 * index, 48 * (index + 1))
        hidden = torch.nn.functional.silu(x @ block.gate[rows].T) * (x @ block.up[rows].T)
        with torch.no_grad():
            found = experts(x, torch.tensor([[index]]), torch.ones(1, 1))
        torch.testing.assert_close(found, hidden @ block.down[:, rows].T, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_experts_does_not_matter_and_their_content_does(kind: str) -> None:
    model = build(kind)
    shuffled = copy.deepcopy(model)
    stranger = build(kind, seed=5)
    order = torch.tensor([2, 0, 1])
    ids = torch.arange(12)[None]
    with torch.no_grad():
        for layer in shuffled.model.layers:
            for parameter in (*layer.mlp.experts.parameters(), layer.mlp.gate.weight):
                parameter.copy_(parameter[order].clone())
        before, after = model(input_ids=ids).logits, shuffled(input_ids=ids).logits
    torch.testing.assert_close(before, after, atol=1e-4, rtol=1e-4)
    base = WeightView.of_module(model)
    for name in ("ics", "ics_whitened", "awm", "score"):
        fingerprint = FINGERPRINTS[name]()
        assert fingerprint.compare(base, WeightView.of_module(shuffled)).value > 0.999, name
    assert abs(FINGERPRINTS["score"]().compare(base, WeightView.of_module(stranger)).value) < 0.15


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_that_keep_experts_apart_are_read(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    model.save_pretrained(tmp_path)
    live, files = WeightView.of_module(model), open_view(tmp_path)
    for name in ("pcs", "ics", "ics_whitened", "awm", "score"):
        assert FINGERPRINTS[name]().compare(live, files).value == pytest.approx(1.0, abs=1e-4)
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(n for n in weights if ".experts.1." in n)
    save_file({n: t for n, t in weights.items() if n != lost}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="expert 1 has no"):
        open_view(tmp_path)


def test_experts_are_not_rewritten_and_clamped_ones_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="mixtures of experts"):
        transform(build("mixtral"), "ffn_permutation")
    odd = CONFIG_MAPPING["gpt_oss"](**(SETTINGS | {"head_dim": 8}))
    with pytest.raises(UnsupportedModelError, match="model_type='gpt_oss'"):
        layout_of(odd)
