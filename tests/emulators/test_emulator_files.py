"""Emulators on disk: bit for bit, nothing of the base too much, hostile folders refused."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedsplit.emulators import Material, adapter_state, make_compressor, plug_in
from fedsplit.emulators import files as emulator_files
from fedsplit.emulators.build import Emulator, build_emulator
from fedsplit.emulators.compression.src import compress_block
from fedsplit.emulators.files import folder_digest, load_emulator, receive, save_emulator
from fedsplit.emulators.importance.harmonizer import make_harmonizers
from fedsplit.emulators.lm import logits_of
from fedsplit.emulators.planning.plan import EmulatorPlan
from fedsplit.errors import ModelError
from fedsplit.models.anatomy import probe
from fedsplit.models.layout.projections import layout_of
from tests.emulators.emulator_families import LAYERS, UNPROBED, tiny, tokens

ROLES = ("adapter", "compress", "harmonizer", "drop", "share", "adapter")
PLAN = EmulatorPlan(ROLES, (0, 1, 2, 3, 1, 5), beta=0.8)


def _mixed(model: Any, name: str = "llama") -> Emulator:
    def edit(_: int, block: Any) -> None:
        if name not in UNPROBED:
            compress_block(block, layout_of(model.config), 0.8)

    return build_emulator(
        model, PLAN, harmonizers={2: make_harmonizers(model)[2]}, edit=edit, details={"a": [1.5]}
    )


@torch.no_grad()
def _logits(emulator: Emulator) -> torch.Tensor:
    return logits_of(emulator.model, tokens())


@pytest.mark.parametrize(
    "name", ["llama-tied", "gpt2", "gpt_neox", "opt", "phi3", "gemma3", "gpt_neo", "mixtral"]
)
def test_read_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    emulator = _mixed(model, name)
    saved = save_emulator(emulator, tmp_path / "e")

    again = load_emulator(tmp_path / "e", expected_digest=saved.digest)

    assert torch.equal(_logits(again), _logits(emulator))
    assert again.plan == emulator.plan
    assert again.base_digest == emulator.base_digest
    assert again.details == {"a": [1.5]}
    assert again.parameter_count() == emulator.parameter_count() == saved.parameters
    assert again.byte_count() == emulator.byte_count()
    assert probe(again.model).tied == probe(model).tied
    trained = {n for n, p in again.model.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in emulator.model.named_parameters() if p.requires_grad}
    plug_in(model, adapter_state(again), again.plan)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("gradot", {"attention": 0.6, "ffn": 0.5}),
        ("quantised", {"bits": 4}),
        ("quantised", {"bits": 8}),
        ("crash", {"clusters": 2}),
        ("magnitude", {"sparsity": 0.5}),
        ("withholding", {"margin": 0.1, "beta": 0.5, "secret": 1}),
    ],
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_kind_of_layer_travels(
    method: str, settings: dict[str, Any], name: str, tmp_path: Path
) -> None:
    compressor = make_compressor(method, adapters=(0, 3), **settings)
    emulator = compressor.build(tiny(name), Material(tokens=tokens()))
    saved = save_emulator(emulator, tmp_path / "e")
    again = load_emulator(saved.folder)
    assert torch.equal(_logits(again), _logits(emulator))
    assert saved.bytes < emulator.byte_count() + 40_000


def test_no_weight_of_a_dropped_replaced_or_compressed_block_is_in_the_file(tmp_path: Path) -> None:
    model = tiny()
    save_emulator(_mixed(model), tmp_path / "e")
    shipped = {
        t.flatten()[:8].numpy().tobytes()
        for t in load_file(tmp_path / "e" / "emulator.safetensors").values()
    }
    blocks = probe(model).blocks
    for position in (2, 3, 4):
        for parameter in blocks[position].parameters():
            assert parameter.detach().flatten()[:8].numpy().tobytes() not in shipped
    for linear in ("q_proj", "k_proj", "v_proj", "o_proj"):
        weight = blocks[1].self_attn.get_submodule(linear).weight
        assert weight.detach().flatten()[:8].numpy().tobytes() not in shipped


def test_one_content_one_digest(tmp_path: Path) -> None:
    a = save_emulator(_mixed(tiny()), tmp_path / "a")
    b = save_emulator(_mixed(tiny()), tmp_path / "b")
    c = save_emulator(_mixed(tiny(seed=1)), tmp_path / "c")
    assert a.digest == b.digest != c.digest
    with pytest.raises(ModelError, match="digest"):
        load_emulator(c.folder, expected_digest=a.digest)
    with pytest.raises(ModelError, match="must be empty"):
        save_emulator(_mixed(tiny()), tmp_path / "a")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]


def test_half_precision(tmp_path: Path) -> None:
    emulator = _mixed(tiny().to(torch.bfloat16))
    save_emulator(emulator, tmp_path / "e")
    again = load_emulator(tmp_path / "e")
    assert {p.dtype for p in again.model.parameters()} == {torch.bfloat16}
    assert torch.equal(_logits(again), _logits(emulator))


def test_owners_that_share_a_cache_may_receive_at_once(tmp_path: Path) -> None:
    saved = save_emulator(_mixed(tiny()), tmp_path / "e")
    files = {p.name: p.read_bytes() for p in saved.folder.iterdir()}
    cache = tmp_path / "cache"
    for _ in range(5):
        start = Barrier(4)

        def one(_: int, start: Barrier = start) -> Path:
            start.wait()
            return receive(files, cache, saved.digest)

        with ThreadPoolExecutor(4) as pool:
            (folder,) = set(pool.map(one, range(4)))
        assert folder_digest(folder) == saved.digest
        assert [p.name for p in cache.iterdir()] == [saved.digest]
        shutil.rmtree(cache)


def test_the_cache_keeps_what_came_and_checks_it(tmp_path: Path) -> None:
    saved = save_emulator(_mixed(tiny()), tmp_path / "e")
    files = {p.name: p.read_bytes() for p in saved.folder.iterdir()}
    cache = tmp_path / "cache"
    folder = receive(files, cache, saved.digest)
    assert folder_digest(folder) == saved.digest
    assert receive({}, cache, saved.digest) == folder  # there already: nothing needs to be sent
    (folder / "emulator.json").write_text("{}")
    assert folder_digest(receive(files, cache, saved.digest)) == saved.digest
    with pytest.raises(ModelError, match="emulator: digest"):
        receive({**files, "config.json": b"{}"}, cache, "0" * 64)
    with pytest.raises(ModelError, match=r"'\.\./x': must be one of the files"):
        receive({**files, "../x": b""}, cache, "0" * 64)
    with pytest.raises(ModelError, match="64 hexadecimal digits"):
        receive(files, cache, "../../x")
    assert [p.name for p in cache.iterdir()] == [saved.digest]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_emulator(_mixed(tiny()), tmp_path_factory.mktemp("good") / "e").folder


def _json(folder: Path, name: str, **changes: Any) -> None:
    value = json.loads((folder / name).read_text())
    for key, new in changes.items():
        value[key] = new(value[key]) if callable(new) else new
    (folder / name).write_text(json.dumps(value))


def _tensors(folder: Path, change: Any) -> None:
    path = folder / "emulator.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


NORM = "model.norm.weight"


def _plan(**changes: Any) -> Any:
    return lambda plan: plan | changes


HOSTILE: dict[str, tuple[Any, str]] = {
    "another file": (lambda f: (f / "run.py").write_text(""), "'run.py': must be one of the files"),
    "a link": (lambda f: (f / "tokenizer.json").symlink_to("/etc/passwd"), "must be a plain file"),
    "no weights": (lambda f: (f / "emulator.safetensors").unlink(), "must hold emulator"),
    "truncated": (
        lambda f: (f / "emulator.safetensors").write_bytes(
            (f / "emulator.safetensors").read_bytes()[:-7]
        ),
        "not a readable safetensors",
    ),
    "not json": (lambda f: (f / "emulator.json").write_text("["), "not JSON"),
    "other format": (lambda f: _json(f, "emulator.json", format=2), "format=2: must be 1"),
    "another key": (lambda f: _json(f, "emulator.json", code="x"), "keys"),
    "no plan": (lambda f: _json(f, "emulator.json", plan=3), "plan"),
    "plan too long": (
        lambda f: _json(f, "emulator.json", plan=_plan(roles=["adapter"] * 7)),
        "plan",
    ),
    "other depth": (
        lambda f: _json(
            f, "emulator.json", plan=_plan(roles=[*ROLES, "drop"], source=[0, 1, 2, 3, 1, 5, 6])
        ),
        "num_hidden_layers=6: must be the plan's 7",
    ),
    "huge depth": (lambda f: _json(f, "config.json", num_hidden_layers=10**9), "num_hidden_layers"),
    "remote attention": (lambda f: _json(f, "emulator.json", attention="user/kernel"), "attention"),
    "code": (lambda f: _json(f, "config.json", auto_map={"a": "b"}), "auto_map"),
    "no model": (lambda f: _json(f, "config.json", model_type="none"), "config.json"),
    "an encoder": (lambda f: _json(f, "config.json", model_type="t5"), "config.json"),
    "other width": (lambda f: _json(f, "config.json", hidden_size=16), "shape|laid out|must"),
    "unfit shapes": (
        lambda f: _json(f, "emulator.json", shapes=lambda s: s | {"0": {}}),
        r"shapes of \['0'\]: must not",
    ),
    "wide harmonizer": (
        lambda f: _json(
            f, "emulator.json", shapes=lambda s: s | {"2": {"width": 10**9, "tuple_length": 0}}
        ),
        "width=1000000000",
    ),
    "high rank": (
        lambda f: _json(
            f,
            "emulator.json",
            shapes=lambda s: (
                s
                | {
                    "1": {
                        "self_attn.q_proj": {
                            "kind": "low-rank",
                            "sizes": [32],
                            "ranks": [10**9],
                            "permuted": False,
                        }
                    }
                }
            ),
        ),
        "must factor",
    ),
    "a wider layer": (
        lambda f: _json(
            f,
            "emulator.json",
            shapes=lambda s: s | {"1": {"mlp.up_proj": {"kind": "plain", "shape": [99, 32]}}},
        ),
        r"must be within \(56, 32\)",
    ),
    "no such layer": (
        lambda f: _json(f, "emulator.json", shapes=lambda s: s | {"1": {"x.y": {}}}),
        "must be one of its linear layers",
    ),
    "foreign tie": (lambda f: _json(f, "emulator.json", ties={"a": NORM}), "ties"),
    "self tie": (lambda f: _json(f, "emulator.json", ties={NORM: NORM}), "ties"),
    "missing tensor": (lambda f: _tensors(f, lambda t: t.pop(NORM)), r"missing \['model\.norm"),
    "extra tensor": (
        lambda f: _tensors(f, lambda t: t.update(x=torch.zeros(2))),
        r"must not be there \['x'\]",
    ),
    "wrong shape": (
        lambda f: _tensors(f, lambda t: t.update({NORM: torch.zeros(31)})),
        r"shape \(31,\)",
    ),
    "nan": (
        lambda f: _tensors(f, lambda t: t.update({NORM: torch.full((32,), torch.nan)})),
        "finite",
    ),
    "wrong dtype": (
        lambda f: _tensors(f, lambda t: t.update({NORM: torch.zeros(32, dtype=torch.long)})),
        "dtype",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_folder_is_refused(case: str, good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "e"
    shutil.copytree(good, folder)
    change, message = HOSTILE[case]
    change(folder)
    with pytest.raises(ModelError, match=message):
        load_emulator(folder)


def test_a_wrong_row_order_is_refused(tmp_path: Path) -> None:
    model = tiny("gpt_neox")
    save_emulator(_mixed(model), tmp_path / "e")

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        name = next(n for n in tensors if n.endswith(".order"))
        tensors[name] = torch.zeros_like(tensors[name])

    _tensors(tmp_path / "e", spoil)
    with pytest.raises(ModelError, match=r"order: must be a permutation"):
        load_emulator(tmp_path / "e")


def test_too_large_or_too_little_disk(good: Path, tmp_path: Path, monkeypatch: Any) -> None:
    limit = emulator_files.LIMITS["config.json"]
    large = tmp_path / "large"
    shutil.copytree(good, large)
    (large / "config.json").write_bytes(b" " * (limit + 1))
    with pytest.raises(ModelError, match=f"bytes: must be <= {limit}"):
        load_emulator(large)
    shutil.rmtree(large)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 5))
    with pytest.raises(ModelError, match="must be <= 5, what the disk has left"):
        save_emulator(_mixed(tiny()), tmp_path / "e")
    assert not list(tmp_path.iterdir())
    files = {p.name: p.read_bytes() for p in good.iterdir()}
    with pytest.raises(ModelError, match="must be <= 5, what the disk has left"):
        receive(files, tmp_path / "cache", folder_digest(good))
    assert not list((tmp_path / "cache").iterdir())


def test_an_emulator_of_another_base_is_refused(good: Path) -> None:
    made = load_emulator(good)
    assert load_emulator(good, expected_base=made.base_digest).plan == made.plan
    with pytest.raises(ModelError, match=r"base_digest='.*': must be this base's 'ab'"):
        load_emulator(good, expected_base="ab")


def test_layers_are_six() -> None:
    assert LAYERS == 6


def test_the_real_model_travels(tmp_path: Path) -> None:
    from fedsplit.emulators.files import load_tokenizer
    from fedsplit.models.loading import load
    from tests.emulators.emulator_families import shared

    loaded = load(shared("models", "gutenberg_llama_seed0"), "causal-lm")
    compressor = make_compressor("scaleot", adapters=(0, 1, 10, 11), beta=0.6, truncation="weights")
    emulator = compressor.build(loaded.model, Material(base_digest=loaded.digest))
    saved = save_emulator(emulator, tmp_path / "e", loaded.tokenizer)
    again = load_emulator(saved.folder, expected_digest=saved.digest)
    ids = load_tokenizer(saved.folder)("It was a dark night", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(logits_of(again.model, ids), logits_of(emulator.model, ids))
    assert again.base_digest == loaded.digest
    assert saved.parameters < 9.75e6
