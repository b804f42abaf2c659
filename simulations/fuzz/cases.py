"""What the fuzz cases of all parsers share: how a case is drawn, damaged files, a tiny model."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import Tokenizer, models, pre_tokenizers

from fedsplit.owners.ledger.chain import canonical
from simulations.bench.fingerprint import write_checkpoint
from simulations.fuzz.damage import damaged_json, damaged_safetensors, flipped

Case = Callable[[], object]
Cases = Callable[[random.Random], Case]
Drawn = TypeVar("Drawn")
SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "vocab_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


def cases_of(draw: Callable[[random.Random], Drawn], parse: Callable[[Drawn], object]) -> Cases:
    """Return cases that draw an input and hand it to a parser."""

    def case(rng: random.Random) -> Case:
        drawn = draw(rng)
        return lambda: parse(drawn)

    return case


def file_cases(
    path: Path, draw: Callable[[random.Random], bytes], parse: Callable[[Path], object]
) -> Cases:
    """Return cases that write a damaged file and hand its path to a parser."""

    def case(rng: random.Random) -> Case:
        path.write_bytes(draw(rng))
        return lambda: parse(path)

    return case


def tensor_file_cases(path: Path, parse: Callable[[Path], object]) -> Cases:
    """Return cases that damage the safetensors file at ``path`` and hand its path to a parser."""
    sound = path.read_bytes()
    return file_cases(path, lambda rng: damaged_safetensors(sound, rng), parse)


def folder_cases(
    folder: Path,
    draw: Callable[[random.Random], Mapping[str, bytes]],
    parse: Callable[[Path], object],
) -> Cases:
    """Return cases that fill a folder with damaged files and hand it to a parser."""

    def case(rng: random.Random) -> Case:
        fill(folder, draw(rng))
        return lambda: parse(folder)

    return case


def tiny_model(folder: Path) -> Path:
    """Write a LLaMA of three blocks with random weights and a tokenizer of forty words."""
    folder.mkdir(parents=True, exist_ok=True)
    write_checkpoint(folder, SHAPE)
    words = {f"w{i}": i for i in range(39)} | {"[UNK]": 39}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"}
    about |= {"pad_token": "w0", "eos_token": "w1"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder


def damaged_file(name: str, content: bytes, rng: random.Random) -> bytes:
    """Return a file's content damaged in the way that its kind is read."""
    if name.endswith(".safetensors"):
        return damaged_safetensors(content, rng)
    if name.endswith(".json") and rng.random() < 0.8:
        return damaged_json(json.loads(content), rng).encode("utf-8", "surrogatepass")
    return flipped(content, rng)


def one_damaged(files: Mapping[str, bytes], rng: random.Random) -> dict[str, bytes]:
    """Return files of which one is damaged or missing."""
    found = dict(files)
    name = rng.choice(sorted(found))
    if rng.random() < 0.05:
        del found[name]
    else:
        found[name] = damaged_file(name, found[name], rng)
    return found


def resealed(
    body: Any, rng: random.Random, seal: Callable[[Any], Any], *, compact: bool = False
) -> bytes:
    """Return damaged JSON that carries the seal of its own damaged content, where it can."""
    text = damaged_json(body, rng)
    try:
        sealed = seal(json.loads(text))
    except Exception:  # no JSON any more, or nothing that can be sealed: sent as it is
        return text.encode("utf-8", "surrogatepass")
    if not compact:
        return json.dumps(sealed).encode()
    plain = {k: v for k, v in sealed.items() if k != "hash"}
    return canonical(plain)[:-1] + f',"hash":"{sealed["hash"]}"}}'.encode()


def fill(folder: Path, files: Mapping[str, bytes]) -> None:
    """Make ``folder`` hold these files alone."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
