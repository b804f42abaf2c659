"""The kind ``lineage-llm`` on a small random LLaMA: every suspect has its row and its verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor
from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig, Qwen2Config

from fedsplit.emulators.lm import divergence, logits_of
from fedsplit.errors import ConfigError, UnsupportedModelError
from fedsplit.models import load
from simulations.core.kinds import KINDS
from simulations.core.run_folder import RunFolder, read_results
from simulations.core.settings import load_experiment
from simulations.lineage import large_model
from simulations.lineage.cuts import cut_width, drop_blocks
from simulations.lineage.descendants import Training, Windows, read_texts, train
from simulations.lineage.large_model import HEALED, MADE, UNTRAINED
from tests.tiny_models import SPECIAL, WORDS, random_model, save_tiny_llama, save_tokenizer

VOCABULARY = len(SPECIAL) + len(WORDS)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("base"), layers=4, width=64)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose configuration has other names, and whose heads follow from its width."""
    folder = tmp_path_factory.mktemp("gpt2")
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_layer=4, n_head=4, n_positions=64, bos_token_id=2
    )
    random_model(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def public_ids() -> Tensor:
    return torch.randint(4, VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(0))


def carry_out(base: Path, folder: Path, *more: str, force: bool = False) -> list[dict[str, Any]]:
    small = (
        "options.steps=0",
        "options.narrow-steps=2",
        'options.transforms=["rotation"]',
        "options.threads=1",
        "options.windows=2",
    )
    experiment = load_experiment("lineage-llm", [f"model={base}", *small, *more])
    with RunFolder(folder, name="x", kind=experiment.result_kind, force=force) as run_folder:
        KINDS[experiment.kind](experiment, run_folder, Console(quiet=True))
    rows: list[dict[str, Any]] = read_results(folder)["rows"]
    return rows


def test_every_suspect_has_a_row_and_none_is_made_twice(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = carry_out(base, tmp_path / "run")
    found = {row["suspect"]: row for row in rows}
    assert list(found) == [*UNTRAINED, HEALED, "map rotation", f"stranger {MADE}"]
    assert found["width-pruned"]["width"] == found[HEALED]["width"] == 48
    assert found[HEALED]["perplexity"] != found["width-pruned"]["perplexity"]
    assert found[HEALED]["perplexity_base"] == found["width-pruned"]["perplexity_base"]
    assert read_results(tmp_path / "run")["skipped"] == []
    assert found["blocks-dropped"]["blocks"] == 3
    assert abs(found[f"stranger {MADE}"]["score"]) < 0.5
    for name in ("pruned", "quantised-8", "quantised-4", "map rotation"):
        assert found[name]["score"] > 0.8, name
    assert all(row["seconds"] > 0 and row["peak_mb"] > 0 for row in rows)
    assert found["map rotation"]["pcs"] < 0.5 < found["map rotation"]["reef"]
    assert found["width-pruned"]["pcs"] is None
    unchanged = found["map rotation"]
    assert unchanged["perplexity"] == pytest.approx(unchanged["perplexity_base"], rel=1e-3)
    with Image.open(tmp_path / "run" / "sheet.png") as sheet:
        assert min(sheet.size) > 2 * 128

    def never(*_: Any) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(large_model.LargeModel, "cell", never)
    assert carry_out(base, tmp_path / "run", force=True) == rows


def test_cuts_run_and_keep_what_they_keep(base: Path) -> None:
    model: Any = load(base, "causal-lm").model
    ids = torch.arange(4, 12)[None]
    narrow, short = cut_width(model, 0.5, public_ids()), drop_blocks(model, 2)
    with torch.no_grad():
        assert narrow(input_ids=ids).logits.shape == model(input_ids=ids).logits.shape
        assert short(input_ids=ids).logits.shape == model(input_ids=ids).logits.shape
        whole, part = model.model.embed_tokens.weight, narrow.model.embed_tokens.weight
    assert part.shape == (whole.shape[0], whole.shape[1] // 2)
    columns = {tuple(c.tolist()) for c in whole.T}
    assert all(tuple(c.tolist()) in columns for c in part.T)
    assert len(short.model.layers) == 2


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(num_key_value_heads=2, attention_bias=True, mlp_bias=True),
        Qwen2Config(num_key_value_heads=2, tie_word_embeddings=True),
    ],
    ids=["llama with biases", "qwen2"],
)
def test_a_cut_takes_away_what_text_does_not_use(config: Any) -> None:
    """Directions and hidden units that are silent go first; without them nothing changes."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config.update(sizes | {"num_attention_heads": 4, "vocab_size": 61})
    config.update({"layer_types": ["full_attention"] * 2, "rms_norm_eps": 1e-12})
    model = random_model(config)
    silent, unused = [1, 5, 6, 30, 8, 11, 13, 19], [0, 7, 9, 12, 17, 21, 22, 40, 41, 42, 43, 47]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "embed_tokens" in name:
                weight[:, silent] = 0
            if "o_proj" in name or "down_proj" in name:
                weight[silent] = 0
            if "up_proj" in name:
                weight[unused] = 0
    narrow = cut_width(model, 0.75, torch.arange(60).view(4, 15))
    # A norm divides by the mean over fewer directions, of which some were zero.
    with torch.no_grad():
        for name, weight in narrow.named_parameters():
            if "norm" in name:
                weight.div_(0.75**0.5)
        ids = torch.arange(20)[None]
        difference = narrow(input_ids=ids).logits - model(input_ids=ids).logits
    assert difference.abs().max() < 1e-4


def test_a_family_whose_width_cannot_be_cut_is_named(gpt2: Path) -> None:
    neox = random_model(
        GPTNeoXConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=VOCABULARY,
        )
    )
    for family, model in (("gpt2", load(gpt2, "causal-lm").model), ("gpt_neox", neox)):
        with pytest.raises(UnsupportedModelError, match=f"model_type='{family}'"):
            cut_width(model, 0.75, public_ids())


def test_what_a_family_does_not_allow_is_left_out_with_the_reason(
    gpt2: Path, tmp_path: Path
) -> None:
    taken = ("options.steps=1", 'options.transforms=["sign_flips","rotation"]')
    rows = carry_out(gpt2, tmp_path / "run", *taken, "options.length=16")
    skipped = {row["suspect"]: row["why"] for row in read_results(tmp_path / "run")["skipped"]}
    assert set(skipped) == {"width-pruned", HEALED, "map sign_flips"}
    assert "model_type='gpt2'" in skipped[HEALED]
    assert "norms remove the mean" in skipped["map sign_flips"]
    kept = {row["suspect"]: row["verdict"] for row in rows}
    assert kept.pop(f"stranger {MADE}") == "independent"
    assert {"lora", "vocabulary", "blocks-dropped", "map rotation"} <= set(kept)
    assert set(kept.values()) == {"in_lineage"}


def test_suspects_are_chosen(base: Path, tmp_path: Path) -> None:
    chosen = 'options.suspects=["pruned","fine-tuned"]'
    rows = carry_out(base, tmp_path / "run", chosen, "options.transforms=[]")
    assert [row["suspect"] for row in rows] == ["pruned", f"stranger {MADE}"], "steps are 0"
    rows = carry_out(
        base, tmp_path / "run", "options.transforms=[]", "options.narrow-steps=0", force=True
    )
    assert [row["suspect"] for row in rows] == [*UNTRAINED, f"stranger {MADE}"]


def test_a_teacher_draws_a_student_toward_itself_and_stays(base: Path) -> None:
    loaded = load(base, "causal-lm")
    teacher: Any = loaded.model
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    windows = Windows(loaded.tokenizer, read_texts().tuning, 16, 0)
    student = cut_width(teacher, 0.75, windows.batch(8))

    def apart() -> float:
        ids = windows.held_out[: 16 * 16].view(16, 16)
        with torch.no_grad():
            return float(divergence(logits_of(teacher, ids), logits_of(student, ids)))

    first = apart()
    train(student, windows, Training(30, 3e-3, 4, 16), teacher=teacher)
    assert apart() < 0.8 * first
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize(
    "change",
    [
        "options.width=1.0",
        "options.drop=1",
        "options.steps=-1",
        "options.narrow-steps=-1",
        'options.suspects=["x"]',
        'options.transforms=["x"]',
        'options.fingerprints=["score"]',
    ],
)
def test_options_out_of_range_are_refused(base: Path, tmp_path: Path, change: str) -> None:
    with pytest.raises(ConfigError, match=r"options\.[\w-]+="):
        carry_out(base, tmp_path / "run", change)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("offsite-llm", "offsite-table"),
        ("offsite-llm-answers", "offsite-table"),
        ("offsite-llm-sweep", "offsite-sweep"),
        ("sap-llm", "sap-depth"),
        ("sap-llm-accuracy", "sweep"),
    ],
)
def test_the_other_configs_on_this_model_can_be_read(name: str, kind: str) -> None:
    assert load_experiment(name, ["model=x"]).kind == kind
