"""LoRA's settings: targets, scales and forms, as PEFT has them."""

from __future__ import annotations

import math

import pytest
import torch

from fedsplit.config import TrainConfig
from fedsplit.config.schedule import rate_factor
from fedsplit.errors import ConfigError
from fedsplit.models.adapters.trainable import make_trainable, method_options
from fedsplit.models.splitting.halves import split
from tests.models.split_families import batch, tiny


@pytest.mark.parametrize(
    ("form", "scale"), [("lora", 3.0 / 4), ("rslora", 3.0 / 2), ("dora", 0.75)]
)
def test_forms_start_as_nothing_and_are_scaled_as_told(form: str, scale: float) -> None:
    bottom, top = split(tiny("llama", "causal-lm"), 1)
    hidden = bottom(*batch())
    mask = batch()[1]
    before = top(hidden, mask)
    config = TrainConfig(
        method="lora", lora_form=form, lora_rank=4, lora_alpha=3.0, lora_targets="q_proj, up_proj"
    )
    trainable = make_trainable(top, "lora", **method_options(config))
    torch.testing.assert_close(top(hidden, mask), before)
    layers = [m for m in top.modules() if hasattr(m, "lora_A")]
    assert {layer.scaling["default"] for layer in layers} == {scale}
    named = dict(trainable.named_parameters())
    assert all(".q_proj.lora_" in n or ".up_proj.lora_" in n for n in named)
    assert len(layers) == 4  # two projections in each of two blocks


def test_targets_that_are_not_there_are_named() -> None:
    top = split(tiny("llama", "causal-lm"), 1)[1]
    with pytest.raises(ConfigError, match="'query': must be among down_proj, gate_proj, k_proj"):
        make_trainable(top, "lora", targets="q_proj,query")


def test_cosine_decay() -> None:
    config = TrainConfig(schedule="cosine", warmup=0.2)
    assert rate_factor(config, 0.1) == pytest.approx(0.5)
    assert rate_factor(config, 0.2) == pytest.approx(1.0)
    assert rate_factor(config, 0.6) == pytest.approx(0.5)
    assert rate_factor(config, 0.4) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert rate_factor(config, 1.0) == pytest.approx(0.0, abs=1e-12)
