"""Halves read from files are those of load and split, and hold nothing of the other side."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedsplit.errors import ConfigError, ModelError
from fedsplit.models.loading import load
from fedsplit.models.splitting.from_files import read_halves
from fedsplit.models.splitting.halves import Bottom, Top, split
from tests.models.split_families import CASES, batch, tiny
from tests.tiny_models import save_tokenizer

# Whose checkpoints name every weight as the model does; the others are loaded whole.
PLAIN = ("llama", "llama-tied", "gpt2", "qwen2", "mistral", "gemma3_text", "opt", "bert", "bloom")
WHOLE = ("mixtral", "qwen3_moe")  # experts are put together on the way
SOME = [(n, t) for n, t in CASES if n in PLAIN]


def saved(folder: Path, name: str, task: str, dtype: torch.dtype = torch.float32) -> Path:
    model = tiny(name, task, vocab_size=100).to(dtype)  # type: ignore[arg-type]
    model.save_pretrained(folder, max_shard_size="8KB")
    save_tokenizer(folder)
    return folder


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def assert_same(mine: Bottom | Top, theirs: Bottom | Top) -> None:
    own, other = tensors(mine), tensors(theirs)
    assert own.keys() == other.keys()
    for name, tensor in own.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize(("name", "task"), SOME)
@pytest.mark.parametrize("k", [0, 2])
def test_they_are_those_of_load_and_split(name: str, task: str, k: int, tmp_path: Path) -> None:
    folder = saved(tmp_path, name, task)
    assert len(list(folder.glob("*.safetensors"))) > 1, "several shards"
    loaded = load(folder, task, dropout=0.0)
    bottom, top = split(loaded.model, k)

    read = read_halves(folder, task, k, dropout=0.0)

    assert read is not None
    assert read.digest == loaded.digest
    assert_same(read.bottom, bottom)
    assert_same(read.top, top)
    assert (read.bottom.task, read.bottom.vocab) == (bottom.task, bottom.vocab)
    assert (read.top.num_labels, read.top.vocab) == (top.num_labels, top.vocab)
    ids, mask = batch()
    hidden, expected = read.bottom(ids, mask), bottom(ids, mask)
    assert torch.equal(hidden, expected)
    assert torch.equal(read.top(hidden, mask), top(expected, mask))
    assert read.tokenizer.pad_token_id == loaded.tokenizer.pad_token_id
    assert read.top.model.config.pad_token_id == top.model.config.pad_token_id


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("asked", [torch.float32, torch.bfloat16])
def test_the_dtype_is_the_one_asked_for(
    stored: torch.dtype, asked: torch.dtype, tmp_path: Path
) -> None:
    folder = saved(tmp_path, "llama-tied", "causal-lm", stored)
    loaded = load(folder, "causal-lm", dtype=asked)
    bottom, top = split(loaded.model, 1)

    read = read_halves(folder, "causal-lm", 1, dtype=asked)

    assert read is not None
    assert read.digest == loaded.digest
    assert_same(read.bottom, bottom)
    assert_same(read.top, top)


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_converted_on_the_way_is_left_to_load(name: str, tmp_path: Path) -> None:
    assert read_halves(saved(tmp_path, name, "causal-lm"), "causal-lm", 1) is None


def test_a_new_head_is_left_to_load(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama", "causal-lm")
    assert read_halves(folder, "sequence-classification", 1, num_labels=3) is None


def test_a_half_trained_leaves_files_and_the_other_half_alone(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama-tied", "causal-lm")
    before = {p.name: load_file(p) for p in folder.glob("*.safetensors")}
    read = read_halves(folder, "causal-lm", 1)
    assert read is not None
    head = [p.clone() for p in read.top.parameters()]
    with torch.no_grad():
        for parameter in read.bottom.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(a, b) for a, b in zip(head, read.top.parameters(), strict=True))
    for path in folder.glob("*.safetensors"):
        again = load_file(path)
        assert all(torch.equal(again[n], t) for n, t in before[path.name].items())


def test_nothing_is_held_twice(tmp_path: Path) -> None:
    """Counted in live memory: every tensor's storage once."""
    folder = saved(tmp_path, "llama", "causal-lm")
    gc.collect()
    known = {id(t) for t in _live()}
    read = read_halves(folder, "causal-lm", 1)
    assert read is not None
    gc.collect()
    held = {t.untyped_storage().data_ptr(): t for t in _live() if id(t) not in known}
    new = sum(t.untyped_storage().nbytes() for t in held.values())
    halves = (read.bottom, read.top)
    own = sum(p.numel() * p.element_size() for half in halves for p in half.parameters())
    assert own <= new < 1.05 * own


def _live() -> list[Tensor]:
    return [one for one in gc.get_objects() if isinstance(one, Tensor) and not one.is_meta]


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"k": 3}, ConfigError, "k=3: must be in 0..2"),
        ({"expected_sha256": "0" * 64}, ModelError, "needs this file"),
        ({"num_labels": 3}, ConfigError, "num_labels"),
    ],
)
def test_bad_input_is_refused_as_by_load(
    change: dict[str, Any], error: type[Exception], told: str, tmp_path: Path
) -> None:
    folder = saved(tmp_path, "llama", "causal-lm")
    asked = {"k": 1} | change
    with pytest.raises(error, match=told):
        read_halves(folder, "causal-lm", asked.pop("k"), **asked)


def test_a_missing_weight_is_told_by_load(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama", "causal-lm")
    path = next(p for p in sorted(folder.glob("*.safetensors")) if len(load_file(p)) > 1)
    kept = dict(list(load_file(path).items())[1:])
    save_file(kept, path, metadata={"format": "pt"})
    assert read_halves(folder, "causal-lm", 1) is None
    with pytest.raises(ModelError):
        load(folder, "causal-lm")
