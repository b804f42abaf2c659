"""A bundle rebuilds its bottom bit for bit, and refuses whatever else it is given."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fedsplit.errors import ModelError
from fedsplit.models.bundle.bottom import LIMITS, Bundle, pack_bottom, unpack_bottom
from fedsplit.models.splitting.halves import split
from tests.models.split_families import CASES, batch, tiny


def _tokenizer(words: int = 30) -> PreTrainedTokenizerFast:
    vocab = {"[PAD]": 0, "[UNK]": 1} | {f"w{i}": i for i in range(2, words)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", padding_side="left"
    )


@pytest.fixture(scope="module")
def good() -> Bundle:
    bottom, _ = split(tiny("llama", "causal-lm"), 1)
    return pack_bottom(bottom, _tokenizer())


# What a bottom holds does not depend on the task: one of each family.
@pytest.mark.parametrize(("name", "task"), list(dict(CASES).items()))
def test_round_trip_is_bit_exact(name: str, task: str) -> None:
    model = tiny(name, task)
    ids, mask = batch()
    for k in (0, 2):
        bottom, _ = split(model, k, verify=False)

        bundle = pack_bottom(bottom, None)
        again, tokenizer = unpack_bottom(bundle)

        assert tokenizer is None
        assert (again.k, again.task, again.vocab) == (k, task, bottom.vocab)
        assert torch.equal(again(ids, mask), bottom(ids, mask))
        theirs = dict(bottom.named_parameters())
        assert theirs.keys() == {n for n, _ in again.named_parameters()}
        assert pack_bottom(again, None).digest == bundle.digest


def test_a_bundle_holds_no_head_and_no_later_block(good: Bundle) -> None:
    tensors = safetensors.torch.load(good.files["bottom.safetensors"])
    names = {n.split(".")[0] for n in tensors}
    assert names == {"embed_tokens", "layers", "rotary_emb"}
    assert {n.split(".")[1] for n in tensors if n.startswith("layers")} == {"0"}
    about = json.loads(good.files["fedsplit.json"])
    assert (about["k"], about["task"], about["format"]) == (1, "causal-lm", 1)
    assert "id2label" not in json.loads(good.files["config.json"])


def test_folder_round_trip(good: Bundle, tmp_path: Path) -> None:
    good.save(tmp_path / "b")
    assert Bundle.load(tmp_path / "b").digest == good.digest
    _, tokenizer = unpack_bottom(tmp_path / "b")
    assert tokenizer is not None
    assert tokenizer(["w5 w6", "w7"], padding=True)["input_ids"] == [[5, 6], [0, 7]]
    with pytest.raises(ModelError, match="must be empty"):
        good.save(tmp_path / "b")


def test_packing_does_not_depend_on_how_the_tokenizer_was_used(good: Bundle) -> None:
    tokenizer = _tokenizer()
    tokenizer(["w2 w3", "w4"], padding=True, truncation=True, max_length=4)
    bottom, _ = split(tiny("llama", "causal-lm"), 1)
    assert pack_bottom(bottom, tokenizer).digest == good.digest


def test_only_listed_plain_files_are_read(good: Bundle, tmp_path: Path) -> None:
    good.save(tmp_path)
    (tmp_path / "modeling.py").write_text("raise SystemExit")
    with pytest.raises(ModelError, match=r"'modeling\.py': must be one of the files"):
        Bundle.load(tmp_path)
    (tmp_path / "modeling.py").unlink()
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").symlink_to("/etc/hostname")
    with pytest.raises(ModelError, match="must be a plain file"):
        Bundle.load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelError, match=r"must hold config\.json"):
        Bundle.load(tmp_path)


def test_sizes_are_bounded(good: Bundle, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"fedsplit\.json: 65537 bytes: must be <= 65536"):
        Bundle({**good.files, "fedsplit.json": b" " * (LIMITS["fedsplit.json"] + 1)})
    good.save(tmp_path)
    (tmp_path / "fedsplit.json").write_bytes(b" " * (LIMITS["fedsplit.json"] + 1))
    with pytest.raises(ModelError, match=r"fedsplit\.json: \d+ bytes: must be <= \d+"):
        Bundle.load(tmp_path)


def _json(file: str, **changes: Any) -> Callable[[dict[str, bytes]], None]:
    def apply(files: dict[str, bytes]) -> None:
        files[file] = json.dumps(json.loads(files[file]) | changes).encode()

    return apply


def _raw(file: str, content: bytes) -> Callable[[dict[str, bytes]], None]:
    return lambda files: files.update({file: content})


def _weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Any], None]:
    def apply(files: dict[str, bytes]) -> None:
        tensors = safetensors.torch.load(files["bottom.safetensors"])
        change(tensors)
        files["bottom.safetensors"] = safetensors.torch.save(tensors)

    return apply


EMBED = "embed_tokens.weight"
PROJ = "layers.0.self_attn.q_proj.weight"
HOSTILE: dict[str, tuple[Callable[[dict[str, bytes]], None], str]] = {
    "remote code": (_json("config.json", auto_map={"AutoModel": "x.Y"}), "'auto_map' is not"),
    "trust": (_json("config.json", trust_remote_code=True), "'trust_remote_code' is not"),
    "nested": (_json("config.json", text_config={"auto_map": {}}), "'auto_map' is not allowed"),
    "private": (_json("config.json", _attn_implementation="org/kernel"), "'_attn_implementation'"),
    "attention": (_json("config.json", attn_implementation="org/kernel"), "is not allowed"),
    "kernel": (_json("fedsplit.json", attention="org/kernel"), r"attention='org/kernel': must be"),
    "unhashable": (_json("fedsplit.json", attention=["eager"]), "must be one of"),
    "experts": (_json("fedsplit.json", experts="org/kernel"), "experts='org/kernel': must be"),
    "quantised": (_json("config.json", quantization_config={}), "is not allowed"),
    "family": (_json("config.json", model_type="vit"), "model_type='vit': must be a language"),
    "no family": (_json("config.json", model_type=["llama"]), "model_type=.*must be"),
    "layers": (
        _json("config.json", num_hidden_layers=10**9),
        r"num_hidden_layers=1000000000: must",
    ),
    "vocab": (_json("config.json", vocab_size=10**12), "shape .* must be .*1000000000000"),
    "width": (_json("config.json", hidden_size=10**9), "must be"),
    "negative": (_json("config.json", hidden_size=-4), "no llama model can be built"),
    "heads": (_json("config.json", num_attention_heads=0), r"config\.json"),
    "type": (_json("config.json", intermediate_size="many"), "no llama model can be built"),
    "number": (_json("config.json", vocab_size=10**400), "a number of 1329 bits: must be within"),
    "deep": (_raw("config.json", b'{"a":' * 5000 + b"1" + b"}" * 5000), r"config\.json"),
    "depth": (_raw("config.json", b'{"a":' * 50 + b"1" + b"}" * 50), "nested deeper than 12"),
    "nan": (_raw("config.json", b'{"a": NaN}'), "not JSON: NaN"),
    "list": (_raw("config.json", b"[1]"), "must be a JSON object, not list"),
    "binary": (_raw("config.json", b"\xff\xfe"), "not JSON"),
    "format": (_json("fedsplit.json", format=2), "format=2: must be 1"),
    "k": (_json("fedsplit.json", k=-1), r"k=-1: must be an integer in 0\.\.1023"),
    "k bool": (_json("fedsplit.json", k=True), "k=True: must be an integer"),
    "other k": (_json("fedsplit.json", k=2), r"num_hidden_layers=2: must be k \+ 1 = 3"),
    "task": (_json("fedsplit.json", task="x"), "task='x': must be a known task"),
    "pickle": (_raw("bottom.safetensors", b"\x80\x04cos\nsystem\n."), "not a safetensors file"),
    "truncated": (
        lambda f: f.update({"bottom.safetensors": f["bottom.safetensors"][:-8]}),
        "not a safetensors file",
    ),
    "no weights": (_raw("bottom.safetensors", safetensors.torch.save({})), "must be there"),
    "head": (
        _weights(lambda t: t.update({"lm_head.weight": torch.ones(2)})),
        "lm_head.weight: mus",
    ),
    "later block": (
        _weights(lambda t: t.update({PROJ.replace("0", "1", 1): t[PROJ].clone()})),
        r"layers\.1.*must not be there",
    ),
    "missing": (_weights(lambda t: t.pop(PROJ)), r"layers\.0.*must be there"),
    "no embedding": (_weights(lambda t: t.pop(EMBED)), "embed_tokens.weight: must be there"),
    "no buffer": (_weights(lambda t: t.pop("rotary_emb.inv_freq")), "inv_freq: must be there"),
    "shape": (_weights(lambda t: t.update({PROJ: torch.ones(16, 15)})), r"shape \(16, 15\): must"),
    "integer": (_weights(lambda t: t.update({PROJ: t[PROJ].int()})), "dtype torch.int32: must be"),
    "float8": (
        _weights(lambda t: t.update({PROJ: t[PROJ].to(torch.float8_e4m3fn)})),
        "dtype torch.float8_e4m3fn: must be",
    ),
    "inf": (
        _weights(lambda t: t[EMBED].fill_(float("inf"))),
        "embed_tokens.weight: must be finite",
    ),
    "tokenizer": (_raw("tokenizer.json", b"{}"), r"tokenizer\.json: not a tokenizer"),
    "half tokenizer": (lambda f: f.pop("tokenizer_config.json"), "must come with the other"),
    "tokenizer path": (
        _json("tokenizer_config.json", tokenizer_file="/etc/passwd"),
        "'tokenizer_file' is not allowed",
    ),
    "tokenizer code": (_json("tokenizer_config.json", auto_map={}), "'auto_map' is not allowed"),
    "tokenizer value": (_json("tokenizer_config.json", padding_side="up"), "padding_side='up'"),
    "more tokens": (
        lambda f: f.update({"tokenizer.json": _tokenizer(99).backend_tokenizer.to_str().encode()}),
        "99 tokens: must be <= 37 embedding rows",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_bundles_are_refused(case: str, good: Bundle) -> None:
    change, message = HOSTILE[case]
    files = dict(good.files)
    change(files)
    with pytest.raises(ModelError, match=message):
        unpack_bottom(Bundle(files))


def test_digest_depends_on_names_and_contents(good: Bundle) -> None:
    changed = {**good.files, "config.json": good.files["config.json"] + b" "}
    assert Bundle(changed).digest != good.digest
    assert Bundle(dict(reversed(good.files.items()))).digest == good.digest


def test_an_attention_that_no_owner_may_load_is_not_packed() -> None:
    bottom, _ = split(tiny("llama", "causal-lm"), 1)
    bottom.model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ModelError, match="attention='flash_attention_2': must be one of"):
        pack_bottom(bottom, None)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_base_stored_in_two_bytes_travels_in_two_bytes(name: str, stored: torch.dtype) -> None:
    task = dict(CASES)[name]
    model = tiny(name, task)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(stored).float()
    bottom, _ = split(model, 1)
    ids, mask = batch()

    bundle = pack_bottom(bottom, None)
    again, _ = unpack_bottom(bundle)

    held = safetensors.torch.load(bundle.files["bottom.safetensors"])
    mine = dict(bottom.model.named_parameters())
    assert {held[name].dtype for name in held.keys() & mine.keys()} == {stored}
    assert all(held[name].dtype != stored for name in held.keys() - mine.keys())
    assert json.loads(bundle.files["fedsplit.json"])["widen"] == "float32"
    for name, parameter in again.model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, mine[name])
    assert torch.equal(again(ids, mask), bottom(ids, mask))


def test_one_weight_that_is_not_exact_in_two_bytes_widens_all() -> None:
    model = tiny("llama", "causal-lm")
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 4] = 1.0 + 2.0**-20
    bundle = pack_bottom(split(model, 0)[0], None)
    held = safetensors.torch.load(bundle.files["bottom.safetensors"])
    assert held["embed_tokens.weight"].dtype == torch.float32
    assert json.loads(bundle.files["fedsplit.json"]).get("widen") is None


def test_a_bfloat16_bottom_stays_one() -> None:
    model = tiny("llama", "causal-lm").bfloat16()
    again, _ = unpack_bottom(pack_bottom(split(model, 1)[0], None))
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}


def test_a_received_folder_can_be_trained_and_stays_as_it_was(good: Bundle, tmp_path: Path) -> None:
    """Tensors are mapped from the file: a step on them must not reach it."""
    good.save(tmp_path / "b")
    bottom, _ = unpack_bottom(tmp_path / "b")
    with torch.no_grad():
        for parameter in bottom.parameters():
            parameter.add_(1.0)
    again, _ = unpack_bottom(tmp_path / "b")
    assert Bundle.load(tmp_path / "b").digest == good.digest
    first, second = next(bottom.parameters()), next(again.parameters())
    assert torch.equal(first, second + 1.0)


@pytest.mark.parametrize("change", [{"format": 2}, {"widen": "float32"}, {"widen": "int8"}])
def test_a_wrong_word_about_the_width_is_refused(good: Bundle, change: dict[str, Any]) -> None:
    about = json.loads(good.files["fedsplit.json"]) | change
    files = {**good.files, "fedsplit.json": json.dumps(about).encode()}
    with pytest.raises(ModelError, match=r"fedsplit\.json: (format|widen)="):
        unpack_bottom(Bundle(files))
