"""Dynamic LayerReplace: frozen model, reproducible and resumable, sensible scores."""

from __future__ import annotations

import copy
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsplit.emulators import Material
from fedsplit.emulators.compressors.scaleot import ScaleOT
from fedsplit.emulators.importance.files import (
    Importance,
    ImportanceSettings,
    load_importance,
    named_harmonizers,
)
from fedsplit.emulators.importance.replace_policy import draw_kept, groups_of, updated_scores
from fedsplit.emulators.importance.run import LayerReplace
from fedsplit.errors import ConfigError, DataError, ModelError
from tests.emulators.emulator_families import LAYERS, tiny, tokens

SETTINGS = ImportanceSettings(steps=8, batch_size=4, group=3, rl_every=2, lr=0.01)


def _run(model: Any, settings: ImportanceSettings = SETTINGS) -> Importance:
    return LayerReplace(model, tokens(), tokens(seed=2), settings).run()


def _same(a: Importance, b: Importance) -> bool:
    left, right = named_harmonizers(a.harmonizers), named_harmonizers(b.harmonizers)
    weights = all(torch.equal(left[n], right[n]) for n in left)
    return weights and a.scores == b.scores and a.history == b.history


def test_groups_leave_no_block_alone() -> None:
    assert groups_of(12, 4) == [range(4), range(4, 8), range(8, 12)]
    assert groups_of(5, 4) == [range(5)]
    assert groups_of(6, 4) == [range(4), range(4, 6)]
    assert groups_of(1, 4) == [range(1)]


def test_half_of_each_group_is_drawn_by_score() -> None:
    scores = torch.tensor([4.0, -4.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    generator = torch.Generator().manual_seed(0)
    counts: Counter[int] = Counter()
    for _ in range(400):
        kept = draw_kept(scores, 4, 0.5, generator)
        assert [sum(i in g for i in kept) for g in groups_of(8, 4)] == [2, 2]
        counts.update(kept)
    assert counts[0] > 240 > 60 > counts[1]
    assert all(150 < counts[i] < 250 for i in range(4, 8))


def test_the_score_update_is_ists() -> None:
    """s_i += lr A_k p_i (1 - p_i): worked by hand for two draws."""
    scores = torch.tensor([0.0, 0.0, 2.0], dtype=torch.float64)
    new = updated_scores(scores, [(0, 2), (1, 2)], [1.0, 2.0], 10.0, "exp")
    advantage = (0.36787944117144233 - 0.1353352832366127) / 2
    expected = torch.tensor([10 * advantage / 4, -10 * advantage / 4, 2.0], dtype=torch.float64)
    torch.testing.assert_close(new, expected)


def test_standardised_rewards_do_not_depend_on_the_size_of_the_loss() -> None:
    scores = torch.zeros(3, dtype=torch.float64)
    subsets = [(0,), (1,), (2,)]
    small = updated_scores(scores, subsets, [1.0, 2.0, 3.0], 1.0, "standardised")
    large = updated_scores(scores, subsets, [101.0, 201.0, 301.0], 1.0, "standardised")
    torch.testing.assert_close(small, large)
    assert small[0] > small[1] > small[2]
    equal = updated_scores(scores, subsets, [1.0, 1.0, 1.0], 1.0, "standardised")
    assert torch.equal(equal, scores)


@pytest.mark.parametrize("hidden", [0.0, 1.0])
def test_the_model_stays_as_it_was_and_the_harmonizers_learn(hidden: float) -> None:
    model = tiny("gpt2").train()
    before = copy.deepcopy(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    names = [n for n, _ in model.named_modules()]

    result = _run(model, ImportanceSettings(**(vars(SETTINGS) | {"hidden_weight": hidden})))

    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert [n for n, _ in model.named_modules()] == names
    assert all(m.training for m in model.modules())
    assert result.step == 8
    assert sum(bool(h.bottleneck.up.weight.any()) for h in result.harmonizers) >= LAYERS // 2
    assert any(result.scores)


def test_one_seed_one_result() -> None:
    again = ImportanceSettings(**(vars(SETTINGS) | {"seed": 1}))
    assert _same(_run(tiny()), _run(tiny()))
    assert not _same(_run(tiny()), _run(tiny(), again))


def test_a_resumed_run_is_an_uninterrupted_one(tmp_path: Path) -> None:
    model = tiny()
    whole = _run(model)
    first = LayerReplace(model, tokens(), tokens(seed=2), SETTINGS)
    first.run(3, checkpoint=tmp_path, every=1)

    second = LayerReplace(model, tokens(), tokens(seed=2), resume=tmp_path)
    assert second.step == 3
    assert _same(second.run(checkpoint=tmp_path), whole)
    assert _same(load_importance(tmp_path, model), whole)
    assert len(list(tmp_path.iterdir())) == 2


def test_progress_is_told_after_each_step() -> None:
    seen = []
    LayerReplace(tiny(), tokens(), tokens(seed=2), SETTINGS).run(progress=seen.append)
    assert [p.step for p in seen] == list(range(1, 9))
    assert all(len(p.scores) == LAYERS for p in seen)


def test_an_interrupted_run_gives_the_model_back() -> None:
    model = tiny()
    names = [n for n, _ in model.named_modules()]

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        LayerReplace(model, tokens(), tokens(seed=2), SETTINGS).run(progress=stop)
    assert [n for n, _ in model.named_modules()] == names
    assert all(p.requires_grad for p in model.parameters())


def test_a_useless_block_scores_below_a_vital_one() -> None:
    """Blocks 1 and 4 change nothing; the others carry what a trained model needs."""
    model = _trained()
    settings = ImportanceSettings(
        steps=36, batch_size=8, group=3, rl_every=2, rl_draws=6, rl_lr=0.6, lr=1e-4
    )
    scores = LayerReplace(model, _pattern(1), _pattern(2), settings).run().scores
    useless = [scores[1], scores[4]]
    vital = [scores[i] for i in (0, 2, 3, 5)]
    assert max(useless) < max(vital)
    assert sum(useless) / 2 < sum(vital) / 4


def test_a_block_that_changes_nothing_costs_nothing() -> None:
    """Harmonizers that learn nothing are the identity, which blocks 1 and 4 are too."""
    settings = ImportanceSettings(steps=1, batch_size=8, group=3, lr=1e-12)
    costs = LayerReplace(_trained(), _pattern(1), _pattern(2), settings).run().costs
    assert costs[1] == pytest.approx(0.0, abs=1e-6)
    assert costs[4] == pytest.approx(0.0, abs=1e-6)
    assert min(costs[i] for i in (0, 2, 3, 5)) > 1e-3


def test_fidelity_does_not_learn_the_public_texts_domain() -> None:
    """On text the model does not know, a lower loss is another model; fidelity stays with it."""
    model, settings = _trained(), {"steps": 60, "batch_size": 16, "group": 3, "lr": 1e-2}
    costs = {}
    for objective in ("fidelity", "loss"):
        asked = ImportanceSettings(objective=objective, **settings)
        run = LayerReplace(model, _pattern(1, first=5), _pattern(2, first=5), asked)
        found = run.run().costs
        costs[objective] = found[1] + found[4]  # blocks that could be replaced at no cost at all
    assert costs["fidelity"] < 0.75 * costs["loss"]


def test_costs_are_kept_with_a_finished_run(tmp_path: Path) -> None:
    model = tiny()
    run = LayerReplace(model, tokens(), tokens(seed=2), SETTINGS)
    assert run.run(4, checkpoint=tmp_path).costs == ()
    with pytest.raises(ConfigError, match="must be finished"):
        ScaleOT(n_adapters=2, alpha=0.5, rank_by="costs").plan(
            model, Material(None, load_importance(tmp_path, model))
        )
    resumed = LayerReplace(model, tokens(), tokens(seed=2), resume=tmp_path)
    costs = resumed.run(checkpoint=tmp_path).costs
    assert costs == _run(model).costs
    assert load_importance(tmp_path, model).costs == costs
    plan = ScaleOT(n_adapters=2, alpha=0.5, rank_by="costs").plan(
        model, Material(None, load_importance(tmp_path, model))
    )
    order = sorted(range(LAYERS), key=lambda i: costs[i])
    assert plan.adapters == tuple(sorted(order[-2:]))
    assert plan.having("harmonizer") == tuple(sorted(order[:2]))


def _pattern(seed: int, first: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(3, 40, (64, 1), generator=generator)
    step = torch.randint(first, first + 2, (64, 1), generator=generator)
    return (start + step * torch.arange(10)) % 50 + 3


def _trained() -> Any:
    model = tiny(seed=3)
    for i in (1, 4):
        for linear in (model.model.layers[i].self_attn.o_proj, model.model.layers[i].mlp.down_proj):
            torch.nn.init.zeros_(linear.weight)
            linear.weight.requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for step in range(40):
        ids = _pattern(100 + step)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"group": 1}, "group=1"),
        ({"replace": 0.0}, r"replace=0\.0: must be > 0"),
        ({"replace": 1.1}, "replace"),
        ({"lr": 0.0}, "lr="),
        ({"rl_draws": 1}, "rl_draws=1: must be an integer >= 2"),
        ({"reward": "best"}, "reward='best': must be one of exp, standardised"),
        ({"objective": "beauty"}, "objective='beauty': must be one of fidelity, loss"),
        ({"cost_batches": -1}, "cost_batches"),
        ({"hidden_weight": -1.0}, "hidden_weight"),
    ],
)
def test_settings_out_of_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ImportanceSettings(**change)


def test_tokens_must_be_blocks_of_ids() -> None:
    with pytest.raises(DataError, match=r"valid \(3,\): must be integer ids \(N, T\)"):
        LayerReplace(tiny(), tokens(), torch.arange(3))


def test_a_run_of_another_base_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    model = tiny()
    run = LayerReplace(model, tokens(), tokens(seed=2), SETTINGS)
    run.run(2)
    run.save(tmp_path)
    with pytest.raises(ModelError, match="base_digest"):
        load_importance(tmp_path, tiny(seed=5))
    with pytest.raises(ConfigError, match="must be the saved run's"):
        LayerReplace(model, tokens(), tokens(), ImportanceSettings(), resume=tmp_path)
    (weights,) = tmp_path.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(ModelError, match="not a readable safetensors"):
        load_importance(tmp_path, model)
    weights.unlink()
    with pytest.raises(ModelError, match="must be there beside"):
        load_importance(tmp_path, model)
    (tmp_path / "importance.json").write_text("[]")
    with pytest.raises(ModelError, match="must be a JSON object"):
        load_importance(tmp_path, model)


def test_a_full_or_forbidden_disk_leaves_the_earlier_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny()
    run = LayerReplace(model, tokens(), tokens(seed=2), SETTINGS)
    run.run(2, checkpoint=tmp_path)
    run.run(2)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 5))
    with pytest.raises(ModelError, match="must be <= 5, what the disk has left"):
        run.save(tmp_path)
    monkeypatch.undo()
    with pytest.raises(ModelError, match="cannot be written"):
        run.save(tmp_path / "importance.json" / "below a file")
    assert load_importance(tmp_path, model).step == 2


def test_half_precision_learns_the_same_order() -> None:
    model = tiny()
    exact = _run(model, SETTINGS)
    half = _run(model, ImportanceSettings(**(vars(SETTINGS) | {"bf16": True})))
    assert half.scores != exact.scores
    assert half.scores == pytest.approx(exact.scores, abs=0.5)
    assert all(p.dtype == torch.float32 for h in half.harmonizers for p in h.parameters())
