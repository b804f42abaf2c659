"""Reading models from disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsplit.errors import ModelError
from fedsplit.fingerprints import FINGERPRINTS, WeightView
from fedsplit.fingerprints.weights_file import open_view

Tiny = Callable[..., Any]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard", ["10MB", "20KB"])
def test_files_and_memory_agree(tiny: Tiny, tmp_path: Path, dtype: torch.dtype, shard: str) -> None:
    model = tiny("llama").to(dtype)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    live, files = WeightView.of_module(model), open_view(tmp_path)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "20KB")
    for name in ("pcs", "ics", "ics_whitened", "awm", "score"):
        found = FINGERPRINTS[name]().compare(live, files)
        assert found.value == pytest.approx(1.0, abs=1e-4), name


def test_only_needed_tensors_are_read(tiny: Tiny, tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    view = open_view(tmp_path)
    read: list[str] = []
    plain = view.get
    view.get = lambda name: (read.append(name), plain(name))[1]  # type: ignore[method-assign]
    dict(FINGERPRINTS["ics"]().factors(view, range(20)))  # type: ignore[attr-defined]
    assert read
    assert not any("layers.0." in n or "embed" in n for n in read)


def test_damaged_files_are_named(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    whole = shards[0].read_bytes()
    shards[0].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=shards[0].name):
        open_view(tmp_path)
    shards[0].unlink()
    with pytest.raises(ModelError, match="missing"):
        open_view(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../other.safetensors"}}))
    with pytest.raises(ModelError, match="plain file name"):
        open_view(tmp_path)
    index.unlink()
    with pytest.raises(ModelError, match="neither"):
        open_view(tmp_path)
    with pytest.raises(ModelError, match=r"config\.json"):
        open_view(tmp_path / "nowhere")
