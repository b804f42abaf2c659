"""Forecasts against emulators that are really built."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import BertConfig

from fedsplit.emulators import COMPRESSORS, Material, make_compressor
from fedsplit.emulators.build import tune_inside
from fedsplit.emulators.importance.files import ImportanceSettings
from fedsplit.emulators.importance.run import LayerReplace
from fedsplit.emulators.planning.planner import PlanRow, describe_base, plan_grid
from fedsplit.errors import ConfigError, ModelError, UnsupportedModelError
from fedsplit.models.adapters.methods import METHODS, MethodSettings
from fedsplit.models.anatomy import probe
from tests.emulators.emulator_families import LAYERS, shared, tiny, tokens

A = (0, 3)
GRID: dict[str, tuple[str, dict[str, Any]]] = {
    "crash": ("crash", {"adapters": A, "clusters": 3}),
    "crash-cut": ("crash", {"adapters": A, "clusters": 2, "share": False}),
    "layerdrop": ("layerdrop", {"adapters": A, "keep": 2}),
    "magnitude": ("magnitude", {"adapters": A, "sparsity": 0.5}),
    "int8": ("quantised", {"adapters": A, "bits": 8}),
    "int4": ("quantised", {"adapters": A, "bits": 4}),
    "gradot": ("gradot", {"adapters": A, "attention": 0.5, "ffn": 0.5}),
    "withholding": ("withholding", {"adapters": A, "margin": 0.1, "beta": 0.6, "secret": 1}),
    "scaleot": ("scaleot", {"adapters": A, "alpha": 0.5}),
    "scaleot-src": ("scaleot", {"adapters": A, "alpha": 0.5, "beta": 0.8}),
    "scaleot-ffn": ("scaleot", {"adapters": A, "alpha": 0.25, "beta": 0.8, "ffn": True}),
}


def _row(name: str, model: Any) -> PlanRow:
    method, settings = GRID[name]
    return plan_grid(describe_base(model), {name: make_compressor(method, **settings)})[0]


def _verbatim(model: Any, emulator: Any) -> int:
    """Count the base's weights found bit for bit in the same place of the emulator."""
    mine, found = dict(emulator.model.named_parameters()), 0
    path = probe(model).blocks_path
    index = {p: i for i, p in enumerate(emulator.plan.positions)}
    for name, tensor in model.named_parameters():
        if name.startswith(path + "."):
            position, _, rest = name[len(path) + 1 :].partition(".")
            if emulator.plan.roles[int(position)] in ("drop", "harmonizer", "share"):
                continue
            name = f"{path}.{index[int(position)]}.{rest}"
        other = mine.get(name)
        if other is not None and other.shape == tensor.shape:
            found += int((other == tensor).sum())
    return found


@pytest.mark.parametrize("name", GRID)
@pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
def test_the_forecast_is_what_gets_built(name: str, family: str) -> None:
    model = tiny(family)
    row = _row(name, model)
    method, settings = GRID[name]
    importance = None
    if method == "scaleot":
        run = ImportanceSettings(steps=1, batch_size=2, group=3)
        importance = LayerReplace(model, tokens(), tokens(), run).run()
    material = Material(tokens=tokens(), importance=importance)
    emulator = make_compressor(method, **settings).build(model, material)

    near = 0.05 if method == "gradot" else 1e-9
    assert row.emulator_params == pytest.approx(emulator.parameter_count(), rel=near)
    assert row.emulator_bytes == pytest.approx(emulator.byte_count(), rel=near)
    assert row.trained_params == emulator.trainable_count()
    assert row.round_bytes == 4 * emulator.trainable_count()
    if method == "gradot":
        return  # its channels are verbatim too, but in narrower matrices
    total = sum(p.numel() for p in model.parameters())
    assert row.revealed == pytest.approx(_verbatim(model, emulator) / total, abs=0.02)


@pytest.mark.parametrize("method", COMPRESSORS)
def test_no_compression_reveals_everything(method: str) -> None:
    base = describe_base(tiny("llama"))
    (row,) = plan_grid(base, {method: COMPRESSORS[method].identity(A)})
    assert row.revealed == 1.0
    assert row.emulator_params == base.total
    assert row.step_share < 1


def test_more_compression_costs_less() -> None:
    base = describe_base(tiny("llama"))
    rows = plan_grid(
        base,
        {
            f"{alpha}, {beta}": make_compressor("scaleot", n_adapters=2, alpha=alpha, beta=beta)
            for alpha in (0.0, 0.5, 1.0)
            for beta in (0.0, 0.9)
        },
    )
    assert [r.name for r in rows] == [
        "0.0, 0.0",
        "0.0, 0.9",
        "0.5, 0.0",
        "0.5, 0.9",
        "1.0, 0.0",
        "1.0, 0.9",
    ]
    for field in ("emulator_bytes", "owner_bytes", "step_flops", "revealed"):
        values = [getattr(r, field) for r in rows]
        assert values == sorted(values, reverse=True), field


def test_a_mixture_can_be_planned_without_ranks() -> None:
    base = describe_base(tiny("mixtral"))
    (row,) = plan_grid(base, {"drop": make_compressor("layerdrop", adapters=A, keep=1)})
    assert row.emulator_params == base.total - 3 * base.sizes.block
    with pytest.raises(UnsupportedModelError, match="scaleot: the block's projections"):
        plan_grid(base, {"src": make_compressor("scaleot", n_adapters=1, beta=0.5)})


def test_bad_grids_name_the_row() -> None:
    base = describe_base(tiny())
    with pytest.raises(ConfigError, match=rf"big: keep=9: must be <= {LAYERS - 2}"):
        plan_grid(base, {"big": make_compressor("layerdrop", adapters=A, keep=9)})
    with pytest.raises(ConfigError, match="batch_size=0"):
        plan_grid(base, {}, batch_size=0)
    with pytest.raises(ConfigError, match="width=3"):
        describe_base(tiny(), width=3)
    with pytest.raises(ModelError):
        describe_base("/nowhere")
    with pytest.raises(UnsupportedModelError, match="'bert' is not a decoder"):
        describe_base(BertConfig(num_hidden_layers=2))


def test_a_configuration_is_enough() -> None:
    config = tiny().config
    config.num_hidden_layers = 80
    base = describe_base(config, width=2)
    assert base.sizes.layers == 80
    (row,) = plan_grid(base, {"ot": make_compressor("layerdrop", adapters=(0, 79), keep=10)})
    assert row.emulator_bytes == 2 * row.emulator_params


def test_the_real_model() -> None:
    base = describe_base(shared("models", "gutenberg_llama_seed0"))
    assert base.total == pytest.approx(9.75e6, rel=0.01)
    assert base.sizes.layers == 12


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
def test_what_a_method_trains_is_forecast(family: str, method: str) -> None:
    model = tiny(family)
    settings = MethodSettings(method=method, rank=3, width=5, prefix=4)
    base = describe_base(model, method=settings)
    whole = describe_base(model)
    grid = {"x": make_compressor("layerdrop", adapters=A, keep=2)}
    row, full = plan_grid(base, grid)[0], plan_grid(whole, grid)[0]
    emulator = make_compressor("layerdrop", adapters=A, keep=2).build(model, Material())
    assert row.trained_params == tune_inside(emulator, settings).count()
    assert row.round_bytes == 4 * row.trained_params
    assert row.emulator_bytes == full.emulator_bytes
    assert row.owner_bytes <= full.owner_bytes
    assert row.revealed == full.revealed
