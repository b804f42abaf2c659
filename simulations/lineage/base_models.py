"""Base models of the lineage experiments: a folder of checkpoints, or small ones trained here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fedsplit.errors import ConfigError
from fedsplit.models.layout.projections import read_config
from fedsplit.models.loading import HEADS, LoadedModel, load, local_tokenizer
from fedsplit.registry import pick
from fedsplit.seeding import derive_seed
from simulations.lineage.descendants import ModelStore, Training, Windows, docstrings, train

OWN_SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
VOCABULARY = 768


@dataclass(frozen=True)
class Base:
    """One base: its name, its folder, its width, and whether it was trained here."""

    name: str
    path: Path
    width: int
    own: bool = False


def find_bases(folder: str) -> list[Base]:
    """Return the checkpoints in ``folder``, a subfolder each, by name.

    They must be independent of each other: every pair of one width becomes a negative.

    Raises:
        ConfigError: if there are fewer than two.
    """
    root = Path(folder).expanduser()
    found = sorted(p.parent for p in root.glob("*/config.json")) if root.is_dir() else []
    if len(found) < 2:
        raise ConfigError(
            f"options.models={folder!r}: must be a folder with two or more model folders in it "
            f"(config.json and safetensors), found {len(found)}; leave it empty to train small "
            f"models here (--set models=DIR)"
        )
    return [Base(p.name, p, int(read_config(p).hidden_size)) for p in found]


def own_bases(store: ModelStore, count: int, plan: Training) -> list[Base]:
    """Train ``count`` small LLaMA models on half of the docstrings, seeds apart: all twins.

    Same data, same tokenizer, same shape: the hardest negatives there are.
    """
    text = docstrings(second=False)
    shape = store.folder / "own-shape"
    _write_shape(shape, text)
    return [from_scratch(store, shape, f"own-seed{n}", text, n, plan) for n in range(count)]


def retrained(store: ModelStore, base: Base, count: int, text: str, plan: Training) -> list[Base]:
    """Train ``count`` models of a base's shape and tokenizer from scratch, seeds apart."""
    name = f"{base.name}-retrained"
    return [from_scratch(store, base.path, f"{name}{n}", text, n, plan) for n in range(count)]


def one_per_width(bases: Sequence[Base]) -> list[Base]:
    """Return the first base of each width."""
    first: dict[int, Base] = {}
    for base in bases:
        first.setdefault(base.width, base)
    return [first[width] for width in sorted(first)]


def chosen(bases: Sequence[Base], names: str) -> list[Base]:
    """Return the bases named in a comma-separated list, or one per width.

    Raises:
        ConfigError: for an unknown name.
    """
    if not names:
        return one_per_width([b for b in bases if not b.name.count("-retrained")])
    known = {base.name: base for base in bases}
    return [pick(known, name.strip(), "options.bases") for name in names.split(",")]


def from_scratch(
    store: ModelStore, shape: Path, name: str, text: str, seed: int, plan: Training
) -> Base:
    """Return a base trained from new weights of a folder's configuration, kept in the store."""
    plan = replace(plan, seed=plan.seed + 1000 + seed)

    def make() -> tuple[LoadedModel, dict[str, Any]]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "lineage-scratch"))
            model = HEADS["causal-lm"].from_config(read_config(shape)).eval()
        loaded = LoadedModel(model, local_tokenizer(shape), "", str(shape))
        windows = Windows(loaded.tokenizer, text, plan.length, plan.seed)
        train(loaded.model, windows, plan)
        return loaded, {"perplexity_after": windows.perplexity(loaded.model)}

    settings = {"from": str(shape), "seed": seed, "text": len(text), **asdict(plan)}
    loaded, _ = store.keep(name, settings, make)
    return Base(name, store.folder / name, int(loaded.model.config.hidden_size), own=True)


def _write_shape(folder: Path, text: str) -> None:
    """Write a configuration and a byte-level BPE tokenizer trained on the text."""
    from tokenizers import ByteLevelBPETokenizer

    if (folder / "tokenizer_config.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer: Any = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        text.split("\n"), vocab_size=VOCABULARY, special_tokens=["<end>"], show_progress=False
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    shape = OWN_SHAPE | {"vocab_size": VOCABULARY}
    (folder / "config.json").write_text(json.dumps(shape, indent=2))
    marks = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(marks | {"bos_token": "<end>"}))


def load_base(base: Base) -> LoadedModel:
    """Return the base, ready to run."""
    return load(base.path, "causal-lm")
