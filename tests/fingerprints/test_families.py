"""The gate works for every family whose projections are found."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModel

from fedsplit.fingerprints.gate.lineage_gate import GateConfig, LineageGate
from tests.tiny_models import random_model

_PATH = Path(__file__).parents[1] / "models" / "families_for_projections.py"
_SPEC = importlib.util.spec_from_file_location("families_for_projections", _PATH)
assert _SPEC is not None
assert _SPEC.loader is not None
families: Any = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(families)


def _random(family: str, seed: int) -> Any:
    config = families.family_config(family)
    return random_model(config, AutoModel, seed=seed, matrices=0.05, vectors=0.05)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_gate(family: str) -> None:
    base = _random(family, 0)
    gate = LineageGate(base, GateConfig(independent=0.2))
    same, foreign = gate.check(base), gate.check(_random(family, 1))
    assert same.verdict == "in_lineage"
    assert same.score == pytest.approx(1.0, abs=1e-4)
    assert foreign.verdict == "independent", foreign
    assert (same.ics is None) == (family == "electra")
