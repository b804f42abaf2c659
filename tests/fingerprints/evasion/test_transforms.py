"""Function-preserving maps keep the function; corrected ICS, AWM and the score do not notice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedsplit.errors import ConfigError, UnsupportedModelError
from fedsplit.fingerprints import FINGERPRINTS, WeightView
from fedsplit.fingerprints.evasion.transforms import (
    TRANSFORMS,
    difference,
    outputs,
    pruning,
    splice,
    transform,
)
from fedsplit.fingerprints.gate.lineage_gate import LineageGate

Tiny = Callable[..., Any]
FAMILIES = ["llama", "gpt2", "gpt_neox", "opt", "bert"]
LACKING = {
    ("key_bias", "llama"),  # no bias
    ("key_bias", "gpt_neox"),  # partly rotary
    ("norm_rescaling", "bert"),  # post-norm: no norm feeds projections only
    ("rotation", "bert"),
    ("residual_scaling", "bert"),
    ("mean_injection", "bert"),
    ("mean_injection", "llama"),  # RMS norms keep the mean
    *{("sign_flips", f) for f in FAMILIES if f != "llama"},
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_invariance(tiny: Tiny, family: str, name: str) -> None:
    model = tiny(family)
    if (name, family) in LACKING:
        with pytest.raises(UnsupportedModelError):
            transform(model, name)
        return

    moved = transform(model, name)

    assert moved.difference < 5e-3
    base, suspect = WeightView.of_module(model), WeightView.of_module(moved.model)
    for kind in ("ics", "ics_whitened", "awm", "score"):
        found = FINGERPRINTS[kind]().compare(base, suspect)
        assert found.value >= 0.999, (kind, found)
        assert min(found.parts.values()) >= 0.999, (kind, found)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_at_once_and_the_gate(tiny: Tiny, family: str) -> None:
    model = tiny(family)
    moved = model
    for name in TRANSFORMS:
        if (name, family) not in LACKING:
            moved = transform(moved, name, seed=3).model
    assert difference(outputs(model), outputs(moved)) < 2e-2
    base, suspect = WeightView.of_module(model), WeightView.of_module(moved)
    for kind in ("ics", "ics_whitened", "awm", "score"):
        assert FINGERPRINTS[kind]().compare(base, suspect).value >= 0.999, kind
    assert FINGERPRINTS["pcs"]().compare(base, suspect).value < 0.5
    assert LineageGate(model).check(moved).verdict == "in_lineage"


def test_the_published_form_is_fooled(tiny: Tiny) -> None:
    model = tiny("llama")
    base = WeightView.of_module(model)
    published = FINGERPRINTS["ics_published"]()
    for name in ("sign_flips", "norm_rescaling", "rotation"):
        suspect = WeightView.of_module(transform(model, name).model)
        assert published.compare(base, suspect).value < 0.9, name


def test_maps_of_strangers_stay_strangers(tiny: Tiny) -> None:
    base = WeightView.of_module(tiny("llama"))
    for name in ("rotation", "sign_flips", "vo_maps"):
        stranger = WeightView.of_module(transform(tiny("llama", seed=8), name).model)
        assert abs(FINGERPRINTS["score"]().compare(base, stranger).value) < 0.1, name


def test_pruning_changes_the_function_and_stays_in_lineage(tiny: Tiny) -> None:
    import copy

    from fedsplit.fingerprints.evasion.editor import Editor

    model = tiny("llama")
    pruned = copy.deepcopy(model)
    pruning(Editor(pruned), torch.Generator())
    assert difference(outputs(model), outputs(pruned)) > 5e-3
    base, suspect = WeightView.of_module(model), WeightView.of_module(pruned)
    assert FINGERPRINTS["score"]().compare(base, suspect).value > 0.9


def test_splicing_is_localised(tiny: Tiny) -> None:
    model = tiny("gpt2")
    spliced = splice(model, tiny("gpt2", seed=6), [0, 2])
    found = FINGERPRINTS["score"]().compare(
        WeightView.of_module(model), WeightView.of_module(spliced)
    )
    assert [s > 0.99 for s in found.per_block] == [False, True, False]


def test_unknown_transform() -> None:
    with pytest.raises(ConfigError, match="ffn_permutation"):
        transform(torch.nn.Linear(1, 1), "nope")
