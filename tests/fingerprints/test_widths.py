"""Models of different width: cuts are known again, twins are not, and the verdict says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from typer.testing import CliRunner

from fedsplit.cli import app_cli
from fedsplit.errors import LineageError
from fedsplit.fingerprints.gate.verdict import judge_widths
from fedsplit.fingerprints.methods.widths import compare_widths
from fedsplit.fingerprints.view import WeightView

Tiny = Callable[..., Any]


def cut(model: Any, width: int, units: float = 1.0, noise: float = 0.0, seed: int = 0) -> Any:
    """Return a LLaMA with some residual directions and hidden units of another, and noise."""
    generator = torch.Generator().manual_seed(seed)
    config = type(model.config).from_dict(model.config.to_dict())
    heads, whole = config.num_attention_heads, config.hidden_size
    config.head_dim = getattr(model.config, "head_dim", None) or whole // heads
    config.hidden_size, inner = width, config.intermediate_size
    config.intermediate_size = int(inner * units)
    keep = torch.randperm(whole, generator=generator)[:width].sort().values
    kept = torch.randperm(inner, generator=generator)[: config.intermediate_size]
    state = {}
    for name, weight in model.state_dict().items():
        part = weight.detach()
        if "gate_proj" in name or "up_proj" in name:
            part = part[kept]
        if "down_proj" in name:
            part = part[:, kept]
        into = part.dim() == 1 or "o_proj" in name or "down_proj" in name
        part = part[keep] if into else part[:, keep]
        drawn = torch.randn(part.shape, generator=generator)
        state[name] = part + (noise * part.std() * drawn if part.dim() > 1 else 0.0)
    narrow = LlamaForCausalLM(config)
    narrow.load_state_dict(state)
    return narrow.eval()


@pytest.fixture
def base(tiny: Tiny) -> Any:
    return tiny("llama", vocab_size=200)


@pytest.mark.parametrize("width", [36, 24])
def test_a_cut_is_one_and_strangers_are_nothing(base: Any, tiny: Tiny, width: int) -> None:
    view = WeightView.of_module(base)
    narrow = WeightView.of_module(cut(base, width))
    for pair in ((view, narrow), (narrow, view)):
        found = compare_widths(*pair)
        assert found.value == pytest.approx(1.0, abs=1e-4)
        assert found.fit == pytest.approx(1.0, abs=1e-4)
        assert judge_widths(found, width).verdict == "in_lineage"
    stranger = WeightView.of_module(cut(tiny("llama", vocab_size=200, seed=5), width))
    found = compare_widths(view, stranger)
    assert abs(found.value) < 0.1
    assert found.fit is not None
    assert found.fit < 0.5
    assert judge_widths(found, width).verdict != "in_lineage"


def test_a_rotated_and_rescaled_cut_is_known_again(base: Any) -> None:
    narrow = cut(base, 24)
    turn = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(3)))[0]
    with torch.no_grad():
        for name, weight in narrow.named_parameters():
            if weight.dim() == 1:
                continue
            into = "o_proj" in name or "down_proj" in name
            weight.copy_(turn.T @ weight if into else weight @ turn)
    narrow.model.embed_tokens.weight.data.mul_(3.0)
    norms = [w for w in narrow.parameters() if w.dim() == 1]
    plain = all(torch.equal(w, torch.ones_like(w)) for w in norms)
    found = compare_widths(*map(WeightView.of_module, (base, narrow)))
    assert found.value > (0.999 if plain else 0.9)  # a norm's gains do not turn with the stream


def test_too_few_rows_are_not_comparable(tiny: Tiny) -> None:
    few = tiny("llama", vocab_size=70)
    with pytest.raises(LineageError, match="70 shared token rows: must be >= 96"):
        compare_widths(*map(WeightView.of_module, (few, cut(few, 24))))


def test_the_command_answers(base: Any, tiny: Tiny, tmp_path: Path) -> None:
    base.save_pretrained(tmp_path / "base")
    cut(base, 36, noise=0.05).save_pretrained(tmp_path / "cut")
    few = tiny("llama", vocab_size=70, hidden_size=64)
    few.save_pretrained(tmp_path / "few")

    def call(name: str, *more: str) -> Any:
        pair = [str(tmp_path / "base"), str(tmp_path / name)]
        environment = {"COLUMNS": "250", "NO_COLOR": "1"}
        return CliRunner().invoke(app_cli, ["compare", *pair, "--no-run", *more], env=environment)

    said = call("cut")
    assert said.exit_code == 0, said.output
    assert "in lineage" in said.output
    assert "widths 48 and 36" in said.output
    # A picture of another width is no likeness even of a descendant, and the command says so.
    assert "go by the verdict" in call("cut", "--pictures", str(tmp_path / "pictures")).output
    said = call("few")
    assert said.exit_code == 1, said.output
    assert "not comparable by this fingerprint: 70 shared token rows" in said.output


def test_trained_twins_and_a_worn_cut(checkpoint: Callable[[str], Path]) -> None:
    load = AutoModelForCausalLM.from_pretrained
    one, two = (load(checkpoint(f"gutenberg_llama_seed{i}"), use_safetensors=True) for i in (0, 1))
    view = WeightView.of_module(one)
    worn = compare_widths(view, WeightView.of_module(cut(one, 128, units=0.7, noise=0.3)))
    assert worn.value == pytest.approx(0.894, abs=0.005)
    assert judge_widths(worn, 128).verdict == "in_lineage"
    twin = compare_widths(view, WeightView.of_module(cut(two, 128)))
    assert twin.value == pytest.approx(0.1147, abs=0.005)
    judged = judge_widths(twin, 128)
    assert judged.verdict != "in_lineage"
    assert judged.threshold == pytest.approx(0.46, abs=0.03)
