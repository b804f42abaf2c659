"""Emulators from plans: the identity, storage, positions, plugging in."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedsplit.emulators.build import adapter_state, build_emulator, load_adapters, plug_in
from fedsplit.emulators.importance.harmonizer import make_harmonizers
from fedsplit.emulators.lm import lm_loss, logits_of
from fedsplit.emulators.planning.plan import EmulatorPlan
from fedsplit.errors import ConfigError, ModelError
from fedsplit.models.anatomy import probe
from fedsplit.models.modes import keep_no_activations
from tests.emulators.emulator_families import FAMILIES, LAYERS, storages, tiny, tokens

PLAN = EmulatorPlan.with_adapters(LAYERS, (0, 4))
MIXED = EmulatorPlan(
    ("adapter", "drop", "harmonizer", "keep", "adapter", "share"), (0, 1, 2, 3, 4, 3)
)


def _mixed(model: Any) -> Any:
    return build_emulator(model, MIXED, harmonizers={2: make_harmonizers(model)[2]})


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    return logits_of(model, tokens())


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_compressed_is_the_base_bit_for_bit(name: str) -> None:
    model = tiny(name)
    emulator = build_emulator(model, PLAN)
    assert torch.equal(_logits(emulator.model), _logits(model))
    assert emulator.parameter_count() == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_no_storage_is_shared_and_the_base_stays_as_it_was(name: str) -> None:
    model = tiny(name).train()
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    config, before = model.config.to_dict(), {n: p.clone() for n, p in model.named_parameters()}

    emulator = _mixed(model)
    emulator.model.train()
    _step(emulator)

    assert not storages(emulator.model) & storages(model)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert model.config.to_dict() == config
    assert all(m.training for m in model.modules())


def _step(emulator: Any) -> None:
    optimizer = torch.optim.SGD(emulator.adapter_parameters().values(), lr=0.1)
    lm_loss(logits_of(emulator.model, tokens()), tokens()).backward()
    optimizer.step()


@pytest.mark.parametrize("name", FAMILIES)
def test_trained_adapters_plug_in_by_position(name: str) -> None:
    model = tiny(name)
    emulator = _mixed(model)
    _step(emulator)
    state = adapter_state(emulator)
    start = _logits(model)

    before = plug_in(model, state, MIXED)

    blocks = probe(model).blocks
    inside = probe(emulator.model).blocks
    for position, index in ((0, 0), (4, 3)):
        pairs = zip(blocks[position].parameters(), inside[index].parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(_logits(model), start)
    plug_in(model, before, MIXED)
    assert torch.equal(_logits(model), start)


@pytest.mark.parametrize("name", FAMILIES)
def test_only_the_adapters_get_gradients(name: str) -> None:
    emulator = _mixed(tiny(name))
    lm_loss(logits_of(emulator.model, tokens()), tokens()).backward()
    mine = {id(p) for p in emulator.adapter_parameters().values()}
    trained = {n for n, p in emulator.model.named_parameters() if p.grad is not None}
    assert trained == {n for n, p in emulator.model.named_parameters() if id(p) in mine}


@pytest.mark.parametrize("name", FAMILIES)
def test_dropped_blocks_are_gone_and_the_rest_is_counted_anew(name: str) -> None:
    model = tiny(name)
    plan = EmulatorPlan(("adapter", "drop", "drop", "keep", "adapter", "drop"))
    emulator = build_emulator(model, plan)
    config = emulator.model.config.get_text_config()
    assert config.num_hidden_layers == len(probe(emulator.model).blocks) == 3
    assert config.use_cache is False
    indices = [
        m.layer_idx
        for block in probe(emulator.model).blocks
        for m in block.modules()
        if hasattr(m, "layer_idx")
    ]
    assert sorted(set(indices)) in ([0, 1, 2], [])
    if getattr(model.config, "layer_types", None):
        old = model.config.layer_types
        assert config.layer_types == [old[0], old[3], old[4]]
    # The same network as the base with the dropped blocks skipped.
    blocks = probe(model).blocks
    skipped = [blocks[i].register_forward_hook(_skip) for i in (1, 2, 5)]
    expected = _logits(model)
    for handle in skipped:
        handle.remove()
    torch.testing.assert_close(_logits(emulator.model), expected)


def _skip(module: Any, args: Any, output: Any) -> Any:
    return (args[0], *output[1:]) if isinstance(output, tuple) else args[0]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "mixtral"])
def test_an_untrained_harmonizer_is_a_dropped_block(name: str) -> None:
    model = tiny(name)
    replaced = EmulatorPlan(("adapter", "harmonizer", "keep", "keep", "keep", "adapter"))
    dropped = EmulatorPlan(("adapter", "drop", "keep", "keep", "keep", "adapter"))
    some = {1: make_harmonizers(model)[1]}
    left = build_emulator(model, replaced, harmonizers=some)
    right = build_emulator(model, dropped)
    if name != "gemma3":
        torch.testing.assert_close(_logits(left.model), _logits(right.model))


@pytest.mark.parametrize(("name", "tied"), [("llama", False), ("llama-tied", True)])
def test_a_tied_head_stays_tied(name: str, tied: bool) -> None:
    model = tiny(name)
    emulator = build_emulator(model, PLAN)
    assert probe(emulator.model).tied is tied
    assert probe(model).tied is tied


def test_shared_blocks_are_one_set_of_weights() -> None:
    model = tiny()
    plan = EmulatorPlan(
        ("adapter", "share", "keep", "share", "keep", "adapter"), (0, 2, 2, 2, 4, 5)
    )
    emulator = build_emulator(model, plan)
    blocks = probe(emulator.model).blocks
    for other in (1, 3):
        pairs = zip(blocks[2].parameters(), blocks[other].parameters(), strict=True)
        assert all(a is b for a, b in pairs)
    assert [b.self_attn.layer_idx for b in blocks] == list(range(6))
    block = sum(p.numel() for p in blocks[0].parameters())
    assert emulator.parameter_count() == sum(p.numel() for p in model.parameters()) - 2 * block


def test_lora_inside_an_adapter_block_comes_back_merged() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model = tiny()
    emulator = build_emulator(model, PLAN)
    names = set(adapter_state(emulator))
    config = LoraConfig(r=2, target_modules=r".*layers\.[04]\.self_attn\.q_proj")
    inject_adapter_in_model(config, emulator.model)
    for name, parameter in emulator.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)

    state = adapter_state(emulator)

    assert set(state) == names
    plug_in(model, state, PLAN)
    torch.testing.assert_close(_logits(model), _logits(emulator.model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"missing \['model\.layers\.0\.input_layernorm\.weight'\] \(1\)"),
        ("extra", r"unknown \['model\.layers\.9\.x'\] \(1\)"),
        ("shape", r"input_layernorm\.weight: shape \(31,\): must be \(32,\)"),
        ("nan", r"input_layernorm\.weight: must be finite"),
        ("dtype", r"input_layernorm\.weight: dtype torch\.int64"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change: str, message: str) -> None:
    model = tiny()
    emulator = build_emulator(model, PLAN)
    state = {n: t + 1 for n, t in adapter_state(emulator).items()}
    name = "model.layers.0.input_layernorm.weight"
    if change == "missing":
        del state[name]
    elif change == "extra":
        state["model.layers.9.x"] = torch.zeros(1)
    else:
        state[name] = {
            "shape": torch.zeros(31),
            "nan": torch.full((32,), torch.nan),
            "dtype": torch.zeros(32, dtype=torch.long),
        }[change]
    start = _logits(model)
    for target in (lambda: plug_in(model, state, PLAN), lambda: load_adapters(emulator, state)):
        with pytest.raises(ModelError, match=message):
            target()
    assert torch.equal(_logits(model), start)
    assert torch.equal(_logits(emulator.model), start)


def test_what_a_plan_needs_must_be_given() -> None:
    model = tiny()
    with pytest.raises(ConfigError, match=r"harmonizers: none for blocks \[2\]"):
        build_emulator(model, MIXED)
    with pytest.raises(ConfigError, match="edit=None"):
        build_emulator(model, EmulatorPlan.with_adapters(LAYERS, [0], "compress"))
    with pytest.raises(ConfigError, match="plan: 2 blocks: must be the model's 6"):
        build_emulator(model, EmulatorPlan.with_adapters(2, [0]))
    with pytest.raises(ConfigError, match="plan: 2 blocks"):
        plug_in(model, {}, EmulatorPlan.with_adapters(2, [0]))


def test_half_precision_stays_half() -> None:
    model = tiny().to(torch.bfloat16)
    emulator = _mixed(model)
    assert {p.dtype for p in emulator.model.parameters()} == {torch.bfloat16}
    assert bool(_logits(emulator.model).isfinite().all())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_checkpointing_changes_no_gradient(name: str) -> None:
    emulator = _mixed(tiny(name))
    parameters = emulator.adapter_parameters()

    def gradients() -> dict[str, torch.Tensor]:
        emulator.model.zero_grad(set_to_none=True)
        lm_loss(logits_of(emulator.model, tokens()), tokens()).backward()
        return {n: p.grad.clone() for n, p in parameters.items()}

    expected = gradients()
    keep_no_activations(emulator.model)
    emulator.model.train()
    for module in emulator.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    emulator.model.config.attn_pdrop = 0.0
    got = gradients()
    for parameter, gradient in expected.items():
        torch.testing.assert_close(got[parameter], gradient)
