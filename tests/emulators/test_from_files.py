"""An emulator built from files is the one of the loaded base, with one block held at a time."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedsplit.emulators import Material, make_compressor
from fedsplit.emulators.files import save_emulator
from fedsplit.emulators.from_files import build_from_files
from fedsplit.emulators.importance.files import ImportanceSettings, load_scores
from fedsplit.emulators.importance.run import LayerReplace
from fedsplit.errors import ConfigError
from fedsplit.models.loading import load
from fedsplit.models.splitting.from_files import Skeleton
from tests.emulators.emulator_families import tiny, tokens
from tests.tiny_models import save_tokenizer

A = (0, 3)
WAYS: dict[str, dict[str, Any]] = {
    "layerdrop": {"keep": 2},
    "magnitude": {"sparsity": 0.5},
    "quantised": {"bits": 4},
    "scaleot": {"alpha": 0.5, "beta": 0.6, "truncation": "weights"},
}


def saved(folder: Path, name: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
    tiny(name, vocab_size=100).to(dtype).save_pretrained(folder, max_shard_size="8KB")  # type: ignore[arg-type]
    save_tokenizer(folder)
    return folder


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_its_digest_is_that_of_the_loaded_base(way: str, name: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "base", name)
    assert len(list(folder.glob("*.safetensors"))) > 1, "several shards"
    loaded = load(folder, "causal-lm", dropout=0.0)
    scores = None
    material = Material(base_digest=loaded.digest)
    if way == "scaleot":
        settings = ImportanceSettings(steps=2, batch_size=4, group=3, rl_every=1)
        run = LayerReplace(loaded.model, tokens(), tokens(seed=2), settings)
        run.run(checkpoint=tmp_path / "importance")
        scores = tmp_path / "importance" / "importance.json"
        importance = load_scores(scores, loaded.model)
        material = Material(importance=importance, base_digest=loaded.digest)
    compressor = make_compressor(way, adapters=A, **WAYS[way])
    whole = compressor.build(loaded.model, material)

    built = build_from_files(folder, compressor, scores=scores, dropout=0.0)

    assert built is not None
    assert built.digest == loaded.digest
    mine = save_emulator(built.emulator, tmp_path / "mine", built.tokenizer)
    theirs = save_emulator(whole, tmp_path / "theirs", loaded.tokenizer)
    assert mine.digest == theirs.digest


@pytest.mark.parametrize("way", ["layerdrop", "quantised"])
def test_one_block_of_the_base_is_held_at_a_time(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path)
    seen: list[weakref.ref[nn.Parameter]] = []
    asked: list[int] = []
    block = Skeleton.block

    @contextmanager
    def watched(self: Skeleton, index: int) -> Iterator[nn.Module]:
        assert all(parameter() is None for parameter in seen), "an earlier block is still held"
        with block(self, index) as given:
            seen.extend(map(weakref.ref, given.parameters()))
            asked.append(index)
            yield given

    monkeypatch.setattr(Skeleton, "block", watched)
    built = build_from_files(folder, make_compressor(way, adapters=A, **WAYS[way]))

    assert built is not None
    assert asked == list(built.emulator.plan.positions)
    assert seen
    assert all(parameter() is None for parameter in seen)


def test_what_must_run_the_base_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    for name, settings in (("gradot", {"ffn": 0.5}), ("layerdrop", {"distil_steps": 3})):
        with pytest.raises(ConfigError, match=f"compressor='{name}': must be one that looks"):
            build_from_files(folder, make_compressor(name, adapters=A, **settings))


def test_a_base_whose_weights_are_converted_is_left_to_load(tmp_path: Path) -> None:
    folder = saved(tmp_path, "mixtral")
    assert build_from_files(folder, make_compressor("layerdrop", adapters=A)) is None
