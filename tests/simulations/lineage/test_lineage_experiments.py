"""Lineage experiments: descendants, the tables' laws, the differentiable score, the benchmark."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fedsplit.errors import ConfigError
from fedsplit.fingerprints import FINGERPRINTS, WeightView
from fedsplit.fingerprints.evasion.editor import Editor
from fedsplit.fingerprints.methods.ics import ICS
from fedsplit.fingerprints.view import choose_tokens
from fedsplit.fingerprints.weights_file import open_view
from fedsplit.models.layout.projections import read_block
from simulations.bench import fingerprint as bench_fingerprint
from simulations.core.run_folder import RunFolder, read_results
from simulations.core.settings import load_experiment
from simulations.lineage.base_models import chosen, find_bases, load_base, own_bases
from simulations.lineage.descendants import (
    RECIPES,
    ModelStore,
    Texts,
    Training,
    Windows,
    quantise,
    read_texts,
    train,
)
from simulations.lineage.evasion import FAMILIES, ScorePenalty, _random
from simulations.lineage.fingerprint_table import COLUMNS, broken_at, earlier_rows, run, separations

RELATIONS = {recipe.relation for recipe in RECIPES.values()} | {"independent"}
SMALL = [
    "options.own-bases=2",
    "options.own-steps=30",
    "options.steps=4",
    "options.batch=4",
    "options.length=24",
    "options.transforms=false",
    "options.breaking-steps=1,2",
    "options.portrait-size=32",
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ModelStore:
    return ModelStore(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def base(store: ModelStore) -> Any:
    return own_bases(store, 1, Training(5, 2e-3, 4, 24))[0]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    where, texts = tmp_path_factory.mktemp("run"), read_texts()
    path, changes = where / "table", list(SMALL)
    for option, text in (("text", texts.tuning), ("other", texts.other)):
        (where / option).write_text(text[:60_000])  # every descendant tokenises all of it
        changes.append(f"options.{option}={where / option}")
    experiment = load_experiment("lineage-table", changes)
    with RunFolder(path, name="t", kind="table") as folder:
        run(experiment, folder, Console(file=io.StringIO()))
    return read_results(path) | {"folder": path}


def test_the_table_has_every_relation_and_keeps_the_bounds(table: dict[str, Any]) -> None:
    rows = table["rows"]
    assert {row["relation"] for row in rows} == RELATIONS
    for row in rows:
        assert {"base", "suspect", "relation", "transform", *COLUMNS} <= row.keys()
        if row["relation"] in ("fine-tuned", "lora"):
            assert row["score"] >= 0.95, row
        if row["relation"] == "independent":
            assert abs(row["score"]) <= 0.1, row
    assert {s["fingerprint"] for s in table["separation"]} == set(COLUMNS)
    assert len(table["breaking"]["steps"]) == 2
    for name in table["pictures"]:
        assert (table["folder"] / name).read_bytes().startswith(b"\x89PNG")


def test_pairs_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    whole, old = dict.fromkeys(COLUMNS, 0.5), {"pcs": 0.5}
    path.write_text(json.dumps({"aa bb none": whole, "aa cc none": old}))
    assert list(earlier_rows(path)) == [
        ({"base": "aa", "suspect": "bb", "transform": "none"}, [whole])
    ]
    path.write_text('{"aa bb')
    assert not list(earlier_rows(path))


def test_a_made_model_is_read_back_and_a_partial_one_is_made_again(
    store: ModelStore, base: Any
) -> None:
    texts, calls = Texts("plain words and numbers " * 400, "x = 1\n" * 2000), []
    plan = Training(2, 1e-3, 2, 16)
    first, facts = store.descendant(base.path, "fine-tuned", texts, plan)
    again, same = store.keep(
        f"{base.name}-fine-tuned",
        json.loads((store.folder / f"{base.name}-fine-tuned" / "made.json").read_text())[
            "settings"
        ],
        lambda: calls.append("made") or (first, {}),  # type: ignore[func-returns-value]
    )
    assert not calls
    assert again.digest == first.digest
    assert same == facts
    (store.folder / f"{base.name}-fine-tuned" / "made.json").unlink()
    rebuilt, _ = store.descendant(base.path, "fine-tuned", texts, plan)
    assert rebuilt.digest == first.digest
    longer, _ = store.descendant(base.path, "fine-tuned", texts, Training(3, 1e-3, 2, 16))
    assert longer.digest != first.digest


def test_training_lowers_held_out_perplexity(base: Any) -> None:
    loaded = load_base(base)
    windows = Windows(loaded.tokenizer, read_texts().other[:60_000], 32, 0)
    before = windows.perplexity(loaded.model)
    train(loaded.model, windows, Training(20, 3e-3, 8, 32))
    assert windows.perplexity(loaded.model) < 0.8 * before


@pytest.mark.parametrize(("bits", "least"), [(8, 0.9999), (4, 0.98)])
def test_quantised_weights_lie_on_a_grid_near_the_originals(
    base: Any, bits: int, least: float
) -> None:
    loaded = load_base(base)
    name = "model.layers.0.mlp.up_proj.weight"
    before = dict(loaded.model.named_parameters())[name].detach().clone()
    quantise(loaded.model, bits)
    after = dict(loaded.model.named_parameters())[name].detach()
    assert torch.nn.functional.cosine_similarity(
        before.flatten(), after.flatten(), dim=0
    ) == pytest.approx(1.0, abs=1 - least)
    assert after[:, :32].unique(dim=1).shape[1] <= 32
    assert max(len(row.unique()) for row in after[:, :32]) <= 2**bits


def test_unknown_models_bases_and_options_are_named(tmp_path: Path, base: Any) -> None:
    with pytest.raises(ConfigError, match=r"options\.models='.*nowhere'.*--set models=DIR"):
        find_bases(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"options\.bases='other': must be one of own-seed0"):
        chosen([base], "other")
    for change, message in (
        ("options.stepz=3", "stepz"),
        ("options.steps=many", "of type int"),
        ("options.breaking-steps='5,3'", "increasing"),
    ):
        experiment = load_experiment("lineage-table", [*SMALL, change])
        folder = RunFolder(tmp_path / message, name="t", kind="table")
        with pytest.raises(ConfigError, match=message):
            run(experiment, folder, Console(file=io.StringIO()))
    assert load_experiment("lineage-table", ["models=some/where"]).options["models"] == "some/where"


def test_separation_and_breaking_points_of_known_numbers() -> None:
    def row(relation: str, value: float, how: str = "none") -> dict[str, Any]:
        names = {"base": "a", "suspect": f"{relation} {value}"}
        return names | {"relation": relation, "transform": how} | dict.fromkeys(COLUMNS, value)

    rows = [row("independent", 0.0), row("independent", 0.2), row("lora", 0.9)]
    rows += [row("pruned", 0.1), row("lora", -1.0, "rotation")]
    found = {(s["fingerprint"], s["models"]): s for s in separations(rows)}
    plain, mapped = found["score", "as they are"], found["score", "with every map"]
    assert plain["auc"] == pytest.approx(0.75)
    assert plain["z_tuned"] == pytest.approx(0.8 / (0.2 / 2**0.5))
    assert mapped["tuned_least"] == -1.0
    series = [{"steps": s} | dict.fromkeys(COLUMNS, v) for s, v in ((1, 0.9), (5, 0.3), (9, 0.1))]
    broken = broken_at(series, {"awm": (0.0, 0.1, 0.4), "score": (0.0, 0.1, 0.05)})
    assert broken["broken_at"] == {"awm": 5, "score": None}


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_every_weight_of_a_block_read_in_the_graph(
    tmp_path: Path, family: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(FAMILIES[family]))
    editor = Editor(_random(tmp_path, 0))
    prefix = editor.prefixes[0]
    block = read_block(editor.layout, editor.parameters, prefix, detach=False)
    for role, site in editor.layout.sites().items():
        (gradient,) = torch.autograd.grad(
            getattr(block, role).square().sum(),
            editor.parameters[prefix + site.weight],
            retain_graph=True,
        )
        assert float(gradient.abs().max()) > 0, role


def test_the_penalty_is_the_gates_score_and_its_gradient_lowers_it(base: Any) -> None:
    original, tuned = load_base(base).model, load_base(base).model
    penalty = ScorePenalty(tuned, 1.0)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.2 * parameter.std() * torch.randn_like(parameter))
    views = WeightView.of_module(original), WeightView.of_module(tuned)
    value = penalty()
    expected = FINGERPRINTS["score"]().compare(*views).value
    assert float(value) == pytest.approx(expected, abs=1e-4)
    torch.autograd.backward([value])
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.grad is not None:
                parameter.sub_(1e-2 * parameter.grad / parameter.grad.norm().clamp_min(1e-12))
    assert float(penalty()) < expected


def test_the_benchmarks_checkpoint_is_read_by_both_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = bench_fingerprint.SHAPE | {
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 200,
    }
    count = bench_fingerprint.write_checkpoint(tmp_path, shape)
    monkeypatch.setattr("fedsplit.fingerprints.methods.ics.fast_bf16", lambda: True)
    view = open_view(tmp_path)
    assert count == sum(torch.Size(s).numel() for s in view.names.values())
    exact = bench_fingerprint.corrected(tmp_path, 100, bf16=False)
    assert bench_fingerprint.corrected(tmp_path, 100) == pytest.approx(exact, rel=5e-3)
    assert bench_fingerprint.published(tmp_path, 100) > 1.0
    tokens = choose_tokens(200, 100)
    short = dict(ICS().factors(view, tokens))
    for key, factors in ICS(bf16=False).factors(view, tokens):
        cosine = torch.nn.functional.cosine_similarity(
            factors.matrix().flatten(), short[key].matrix().flatten(), dim=0
        )
        assert float(cosine) > 0.9999
