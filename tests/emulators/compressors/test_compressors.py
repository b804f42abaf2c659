"""The contract of every compressor, and what is special about each."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedsplit.emulators import COMPRESSORS, EmulatorPlan, Material, make_compressor
from fedsplit.emulators.build import adapter_state, build_emulator, plug_in
from fedsplit.emulators.compression.linears import QuantisedLinear, _pack, _unpack
from fedsplit.emulators.compressors.crash import centre_of, cka_matrix, cluster, runs_between
from fedsplit.emulators.compressors.distil import Distil, distil
from fedsplit.emulators.compressors.gradot import allocate, best_channels, whiten
from fedsplit.emulators.compressors.layerdrop import LayerDrop, uniform_indices
from fedsplit.emulators.compressors.magnitude import pruned
from fedsplit.emulators.compressors.scaleot import ScaleOT
from fedsplit.emulators.importance.files import Importance, ImportanceSettings
from fedsplit.emulators.importance.run import LayerReplace
from fedsplit.emulators.lm import divergence, lm_loss, logits_of, mean_loss
from fedsplit.errors import ConfigError, ModelError
from fedsplit.models.anatomy import probe
from tests.emulators.emulator_families import FAMILIES, LAYERS, UNPROBED, storages, tiny, tokens

A = (0, 3)
# Settings that really compress, by method.
STRONG: dict[str, dict[str, Any]] = {
    "crash": {"clusters": 2},
    "gradot": {"attention": 0.6, "ffn": 0.5},
    "layerdrop": {"keep": 2},
    "magnitude": {"sparsity": 0.5},
    "quantised": {"bits": 4},
    "scaleot": {"alpha": 0.5, "beta": 0.7},
    "withholding": {"margin": 0.1, "rank": 4, "beta": 0.7, "secret": 1},
}
NEEDS_LAYOUT = {"gradot", "scaleot", "withholding"}
SOME = ("llama", "gpt2", "gpt_neox", "phi3", "opt", "gemma3", "mixtral")


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    return logits_of(model, tokens())


def _importance(model: Any) -> Importance:
    settings = ImportanceSettings(steps=2, batch_size=4, group=3, rl_every=1)
    return LayerReplace(model, tokens(), tokens(seed=2), settings).run()


def test_every_method_has_a_strong_setting() -> None:
    assert set(STRONG) == set(COMPRESSORS)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("method", COMPRESSORS)
def test_at_zero_compression_it_is_the_base_bit_for_bit(method: str, name: str) -> None:
    model = tiny(name)
    emulator = COMPRESSORS[method].identity(A).build(model, Material())
    assert torch.equal(_logits(emulator.model), _logits(model))
    assert emulator.plan.adapters == A
    assert emulator.method == method


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("method", COMPRESSORS)
def test_compressed_trained_and_plugged_back(method: str, name: str) -> None:
    if name in UNPROBED and method in NEEDS_LAYOUT:
        pytest.skip("no layout for mixtures of experts")
    model = tiny(name)
    importance = _importance(model) if method == "scaleot" else None
    before = copy.deepcopy(model.state_dict())
    start = _logits(model)
    material = Material(tokens=tokens(), importance=importance, batch_size=4)

    emulator = make_compressor(method, adapters=A, **STRONG[method]).build(model, material)
    zero_shot = _logits(emulator.model)
    optimizer = torch.optim.SGD(emulator.adapter_parameters().values(), lr=0.05)
    lm_loss(logits_of(emulator.model, tokens()), tokens()).backward()
    optimizer.step()

    assert bool(zero_shot.isfinite().all())
    assert not torch.allclose(zero_shot, start, atol=1e-3)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not storages(emulator.model) & storages(model)
    assert all(p.requires_grad for p in model.parameters())
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    assert emulator.byte_count() < whole or method == "magnitude"
    undo = plug_in(model, adapter_state(emulator), emulator.plan)
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed
    assert changed <= set(undo)
    plug_in(model, undo, emulator.plan)
    assert torch.equal(_logits(model), start)


def test_unknown_names_and_settings() -> None:
    with pytest.raises(ConfigError, match="compressor='zip': must be one of crash, gradot"):
        make_compressor("zip")
    with pytest.raises(ConfigError, match="crash setting='size'"):
        make_compressor("crash", adapters=A, size=3)
    with pytest.raises(ConfigError, match="missing 1 required"):
        make_compressor("crash")


@pytest.mark.parametrize("method", ["crash", "gradot", "withholding"])
def test_calibration_needs_tokens(method: str) -> None:
    compressor = make_compressor(method, adapters=A, **STRONG[method])
    with pytest.raises(ConfigError, match="needs task-independent tokens"):
        compressor.build(tiny(), Material())


@pytest.mark.parametrize("method", sorted(set(COMPRESSORS) - {"scaleot"}))
@pytest.mark.parametrize("adapters", [(), (0, 0), (-1,), (LAYERS,)])
def test_adapters_are_checked(method: str, adapters: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError):
        make_compressor(method, adapters=adapters).build(tiny(), Material())


# --- LayerDrop and distillation


@pytest.mark.parametrize(
    ("total", "keep", "expected"),
    [(8, 4, [0, 2, 5, 7]), (8, 2, [0, 7]), (8, 1, [3]), (8, 0, []), (1, 1, [0]), (3, 3, [0, 1, 2])],
)
def test_uniform_indices(total: int, keep: int, expected: list[int]) -> None:
    assert uniform_indices(total, keep) == expected


def test_layerdrop_keeps_what_it_says() -> None:
    emulator = LayerDrop((0, 5), keep=2).build(tiny(), Material())
    assert emulator.plan.positions == (0, 1, 4, 5)
    with pytest.raises(ConfigError, match="keep=5: must be <= 4"):
        LayerDrop((0, 5), keep=5).build(tiny(), Material())


def test_distillation_teaches_the_middle_and_nothing_else() -> None:
    model = tiny("gpt2").train()
    emulator = LayerDrop((0, 5), keep=2).build(model, Material())
    before = {n: p.clone() for n, p in emulator.model.named_parameters()}
    losses = distil(emulator, model, tokens(), Distil(steps=12, lr=3e-3, batch_size=6))
    assert losses[-1] < losses[0]
    moved = {
        n.split(".")[2]
        for n, p in emulator.model.named_parameters()
        if not torch.equal(p, before[n])
    }
    assert moved == {"1", "2"}
    mine = {id(p) for p in emulator.adapter_parameters().values()}
    assert all(p.requires_grad == (id(p) in mine) for p in emulator.model.parameters())
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert emulator.details["distil"]["steps"] == 12


def test_distilling_nothing_is_refused() -> None:
    model = tiny()
    emulator = LayerDrop(tuple(range(6))).build(model, Material())
    with pytest.raises(ConfigError, match="must be those of some block"):
        distil(emulator, model, tokens())


# --- CRaSh


def test_cka_knows_rotations_and_strangers() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=generator).double()
    turned = x @ torch.linalg.qr(torch.randn(5, 5, generator=generator).double()).Q * 3 + 1
    other = torch.randn(60, 7, generator=generator).double()
    matrix = cka_matrix([x, turned, other, torch.ones(60, 2).double()])
    assert float(matrix[0, 1]) == pytest.approx(1.0)
    assert float(matrix[0, 2]) < 0.4
    assert matrix[3].abs().max() == 0


def test_clusters_are_adjacent_and_stay_between_adapters() -> None:
    place = torch.tensor([0.0, 1, 1.1, 5, 5.1, 5.2])
    similar = torch.exp(-(place[:, None] - place).abs())
    runs = runs_between(7, (6,))
    assert cluster(similar, runs, 3) == [[0], [1, 2], [3, 4, 5]]
    assert centre_of(similar, [3, 4, 5]) == 4
    assert runs_between(6, (2,)) == [[0, 1], [3, 4, 5]]
    assert cluster(similar, runs_between(6, (2,)), 2) == [[0, 1], [3, 4, 5]]


def test_crash_shares_or_removes() -> None:
    model = tiny()
    material = Material(tokens=tokens())
    shared = make_compressor("crash", adapters=(0, 5), clusters=2).build(model, material)
    removed = make_compressor("crash", adapters=(0, 5), clusters=2, share=False)
    assert len(probe(shared.model).blocks) == LAYERS
    fewer = removed.build(model, material)
    assert len(probe(fewer.model).blocks) == 4
    assert fewer.parameter_count() == shared.parameter_count()
    with pytest.raises(ConfigError, match=r"clusters=1: must be in 2\.\.4"):
        make_compressor("crash", adapters=(0, 3), clusters=1).build(model, material)


# --- GradOT


def test_the_whitened_truncation_is_best_in_its_metric() -> None:
    generator = torch.Generator().manual_seed(0)

    def moment(size: int) -> torch.Tensor:
        root = torch.randn(size, size, generator=generator).double()
        return root @ root.T * torch.logspace(0, -4, size, dtype=torch.float64)[:, None] ** 0

    weight = torch.randn(9, 12, generator=generator).double()
    c, s = moment(12), moment(9)
    spectrum = whiten(weight, c, s, 1e-9)

    def cost(matrix: torch.Tensor) -> float:
        d = matrix - weight
        return float(torch.trace(d.T @ s @ d @ c))

    got = spectrum.factors(4).dense()
    assert cost(got) == pytest.approx(float(spectrum.gains[4:].sum()), rel=1e-5)
    u, v, w = torch.linalg.svd(weight)
    assert cost(got) < cost(u[:, :4] * v[:4] @ w[:4])
    torch.testing.assert_close(spectrum.factors(9).dense(), weight)


def test_ranks_go_where_the_gain_is_and_keep_the_budget() -> None:
    falling = torch.tensor([100.0, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3])
    flat = torch.full((6,), 50.0)
    spectra = {(0, "q"): ((6, 6), falling), (1, "q"): ((6, 6), flat)}
    fused = {k: k for k in spectra}
    assert allocate(spectra, 0.5, fused) == {(0, "q"): 1, (1, "q"): 2}
    assert allocate(spectra, 1.0, fused) == {}
    assert allocate(spectra, 0.0, fused) == {(0, "q"): 1, (1, "q"): 1}
    more = allocate(spectra, 0.75, fused)
    assert more == {(0, "q"): 1}  # the flat one keeps its matrix: 36 + 12 <= 54


def test_one_factored_projection_factors_its_whole_fused_layer() -> None:
    spectra = {
        (0, "q"): ((6, 6), torch.tensor([100.0, 0, 0, 0, 0, 0])),
        (0, "v"): ((6, 6), torch.full((6,), 50.0)),
    }
    ranks = allocate(spectra, 0.7, dict.fromkeys(spectra, "qkv"))
    assert ranks == {(0, "q"): 1, (0, "v"): 2}


def test_channels_are_the_best_of_all_blocks() -> None:
    scores = {1: torch.tensor([5.0, 0.1, 4.0]), 2: torch.tensor([0.2, 0.3, 0.05])}
    kept = best_channels(scores, 0.5)
    assert {i: k.tolist() for i, k in kept.items()} == {1: [0, 2], 2: [1]}
    assert [len(k) for k in best_channels(scores, 1.0).values()] == [1, 1]


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "bloom"])
def test_a_channel_that_carries_nothing_goes_first(name: str) -> None:
    """A third of the channels of each block has no way out: removing it changes no logit."""
    from fedsplit.emulators.compression.linears import matrix_of
    from fedsplit.emulators.compression.src import module_of
    from fedsplit.models.layout.projections import layout_of

    model = tiny(name)
    down = module_of(layout_of(model.config).sites()["down"])
    size = 0
    with torch.no_grad():
        for block in probe(model).blocks:
            matrix = matrix_of(block.get_submodule(down))
            size = matrix.shape[1]
            matrix[:, : size // 3] = 0
    start = _logits(model)
    compressor = make_compressor("gradot", adapters=A, ffn=(size // 3) / size)
    emulator = compressor.build(model, Material(tokens=tokens()))
    torch.testing.assert_close(_logits(emulator.model), start)
    assert set(emulator.details["channels"].values()) == {size - size // 3}


def test_gradots_rank_beats_plain_svd_on_its_own_calibration() -> None:
    model, ids = tiny(seed=4), tokens(24)
    base = mean_loss(model, ids)
    material = Material(tokens=ids)
    wise = make_compressor("gradot", adapters=A, attention=0.5).build(model, material)
    plain = make_compressor("scaleot", adapters=A, beta=0.75).build(model, material)
    assert wise.parameter_count() == pytest.approx(plain.parameter_count(), rel=0.03)
    assert abs(mean_loss(wise.model, ids) - base) < abs(mean_loss(plain.model, ids) - base)


# --- magnitude and quantisation


def test_pruning_takes_the_smallest() -> None:
    matrix = torch.tensor([[1.0, -5.0], [0.5, 3.0]])
    assert pruned(matrix, 0.5).tolist() == [[0.0, -5.0], [0.0, 3.0]]
    assert torch.equal(pruned(matrix, 0.0), matrix)
    assert not pruned(matrix, 1.0).any()


@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_is_within_half_a_step(bits: int) -> None:
    weight = torch.randn(7, 9, generator=torch.Generator().manual_seed(0))
    weight[2] = 0
    layer = QuantisedLinear(9, 7, bits, bias=False, like=weight)
    layer.set_weight(weight)
    top = 2 ** (bits - 1) - 1
    step = weight.abs().amax(1, keepdim=True) / top
    assert bool(((layer.weight - weight).abs() <= step / 2 + 1e-7).all())
    assert layer.codes.numel() == 7 * (9 if bits == 8 else 5)


def test_four_bit_codes_pack_without_loss() -> None:
    codes = torch.arange(-7, 8, dtype=torch.int8).repeat(2, 1)
    assert torch.equal(_unpack(_pack(codes), 15), codes)


def test_more_bits_less_harm() -> None:
    model = tiny()
    start = _logits(model)
    harm = [
        float(
            (
                _logits(
                    make_compressor("quantised", adapters=A, bits=bits)
                    .build(model, Material())
                    .model
                )
                - start
            )
            .abs()
            .max()
        )
        for bits in (4, 8, 32)
    ]
    assert harm[0] > harm[1] > harm[2] == 0


# --- ScaleOT


def test_scaleot_takes_the_scores_choice_and_records_it() -> None:
    model = tiny()
    importance = _importance(model)
    compressor = make_compressor("scaleot", n_adapters=2, alpha=0.5, beta=0.5, truncation="weights")
    emulator = compressor.build(model, Material(importance=importance))
    order = sorted(range(LAYERS), key=lambda i: (-importance.scores[i], i))
    assert set(emulator.plan.adapters) == set(order[:2])
    assert set(emulator.plan.having("harmonizer")) == set(order[4:])
    assert emulator.details["scores"] == list(importance.scores)
    assert set(emulator.details["ranks"]) == {str(i) for i in order[2:4]}


def test_settling_trains_the_chosen_harmonizers_only() -> None:
    model = tiny()
    importance = _importance(model)
    before = [h.bottleneck.up.weight.clone() for h in importance.harmonizers]
    material = Material(tokens=tokens(), importance=importance, batch_size=4)
    settings = {"adapters": A, "alpha": 0.5}
    plain = make_compressor("scaleot", **settings).build(model, material)
    settled = make_compressor("scaleot", **settings, settle_steps=8, settle_lr=1e-2)
    emulator = settled.build(model, material)
    goal = logits_of(model, tokens())
    apart = [divergence(goal, logits_of(e.model, tokens())) for e in (emulator, plain)]
    assert apart[0] < 0.9 * apart[1]
    pairs = zip(importance.harmonizers, before, strict=True)
    assert all(torch.equal(h.bottleneck.up.weight, b) for h, b in pairs)


def test_settled_harmonizers_serve_every_beta() -> None:
    model = tiny()
    material = Material(tokens=tokens(), importance=_importance(model), batch_size=4)
    common: dict[str, Any] = {"adapters": A, "alpha": 0.5, "settle_lr": 1e-2}
    whole = make_compressor("scaleot", **common, settle_steps=4).build(model, material)
    again = ScaleOT(**common, settle_steps=4, beta=0.5)
    cut = again.build(model, material)
    # Settled beside whole blocks: what is compressed afterwards is not made up for.
    for position in whole.plan.having("harmonizer"):
        a, b = (probe(e.model).blocks[e.plan.positions.index(position)] for e in (whole, cut))
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    once = replace(material, importance=again.settled(model, material))
    reused = make_compressor("scaleot", adapters=A, alpha=0.5, beta=0.5).build(model, once)
    assert torch.equal(logits_of(reused.model, tokens()), logits_of(cut.model, tokens()))


@pytest.mark.parametrize("change", [{"hidden_at": "x"}, {"logit_weight": -1.0}])
def test_distillation_settings_out_of_range(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        Distil(**change)


def test_matching_places_are_those_that_enter_adapters() -> None:
    model = tiny()
    plan = EmulatorPlan.with_adapters(LAYERS, (2, 3))
    emulator = build_emulator(model, plan)
    # Every block outside A is the base's own: hidden states and logits agree, nothing to learn.
    both = Distil(steps=1, batch_size=6, lm_weight=0, logit_weight=1, hidden_at="inputs")
    assert distil(emulator, model, tokens(), both)[0] == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        next(probe(emulator.model).blocks[1].parameters()).add_(1.0)
    hidden = Distil(steps=1, batch_size=6, lm_weight=0, hidden_at="inputs")
    assert distil(emulator, model, tokens(), hidden)[0] > 1e-4


def test_scaleot_refuses_what_does_not_fit() -> None:
    model = tiny()
    with pytest.raises(ConfigError, match="one of the two"):
        make_compressor("scaleot")
    with pytest.raises(ConfigError, match="needs an importance run"):
        make_compressor("scaleot", n_adapters=2).build(model, Material())
    foreign = Material(importance=_importance(tiny(seed=9)))
    with pytest.raises(ModelError, match="importance: base_digest"):
        make_compressor("scaleot", n_adapters=2).build(model, foreign)
    with pytest.raises(ConfigError, match=r"n_adapters=9: must be in 1\.\.6"):
        make_compressor("scaleot", n_adapters=9).build(
            model, Material(importance=_importance(model))
        )


def test_families_are_all_known() -> None:
    assert set(SOME) <= set(FAMILIES)
