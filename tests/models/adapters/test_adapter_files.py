"""Adapters on disk: PEFT loads what it can express, ours the rest; the same logits either way."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from fedsplit.errors import ConfigError, ModelError
from fedsplit.models.adapters.files import OWN_SETTINGS, OWN_WEIGHTS, attach_saved, save_adapter
from tests.models.adapters.test_adapter_methods import FAMILIES, attach, logits, model_of, train


@pytest.fixture
def trained(tmp_path: Path) -> Any:
    def make(name: str, method: str) -> tuple[Any, Any, str, Path]:
        base = model_of(name)
        model = copy.deepcopy(base)
        tuning = attach(model, method)
        train(model, tuning)
        kind = save_adapter(tuning, model, tmp_path / "adapter", "base/name")
        return base, model, kind, tmp_path / "adapter"

    return make


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", ["lora", "full", "bitfit"])
def test_peft_loads_it_on_the_base(trained: Any, name: str, method: str) -> None:
    base, model, kind, folder = trained(name, method)
    start = logits(base)
    loaded = PeftModel.from_pretrained(base, folder)
    assert kind == "peft"
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-6, rtol=1e-6)
    assert not torch.allclose(logits(loaded), start, atol=1e-4)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
@pytest.mark.parametrize("method", ["bottleneck", "prefix"])
def test_ours_loads_the_rest(trained: Any, name: str, method: str) -> None:
    base, model, kind, folder = trained(name, method)
    tuning = attach_saved(base, folder)
    assert kind == "fedsplit"
    assert tuning.method == method
    assert torch.equal(logits(base), logits(model))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"blocks": [1, 9]}, ModelError),
        ({"blocks": ["1"]}, ModelError),
        ({"format": 2}, ModelError),
        ({"code": "x"}, ModelError),
        ({"width": 0}, ConfigError),
        ({"width": 6}, ModelError),
        ({"method": "zip"}, ConfigError),
    ],
)
def test_a_foreign_folder_is_refused(
    trained: Any, change: dict[str, Any], error: type[Exception]
) -> None:
    base, _, _, folder = trained("llama-gqa", "bottleneck")
    about = json.loads((folder / OWN_SETTINGS).read_text())
    (folder / OWN_SETTINGS).write_text(json.dumps(about | change))
    with pytest.raises(error):
        attach_saved(base, folder)


def test_a_truncated_file_is_refused(trained: Any) -> None:
    base, _, _, folder = trained("llama-gqa", "prefix")
    path = folder / OWN_WEIGHTS
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ModelError, match="no readable adapter"):
        attach_saved(base, folder)
