"""Fuzz cases for files: bundles, emulators, adapters, checkpoints, states, run folders."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from fedsplit.attacks.transcripts import read_transcript
from fedsplit.emulators import make_compressor
from fedsplit.emulators.compressors.base import Material
from fedsplit.emulators.files import load_emulator, load_tokenizer, save_emulator
from fedsplit.models import split
from fedsplit.models.adapters.peft_folder import attach_peft
from fedsplit.models.bundle.bottom import Bundle, pack_bottom, unpack_bottom
from fedsplit.models.bundle.head import unpack_head, with_head
from fedsplit.models.loading import load
from fedsplit.models.splitting.heads import detach_head
from fedsplit.models.trained.weights import load_trained, save_trained
from fedsplit.observe.console import PlainConsole
from simulations.core import watch
from simulations.fuzz.cases import (
    SHAPE,
    Cases,
    cases_of,
    fill,
    folder_cases,
    one_damaged,
    resealed,
    tensor_file_cases,
    tiny_model,
)
from simulations.fuzz.damage import damaged_json, damaged_safetensors, flipped
from strategies.rounds.state_folder import StateFolder


def bottoms(scratch: Path) -> Cases:
    """Fuzz bottom bundles that a server sends, with the right digest."""
    loaded = load(str(tiny_model(scratch / "model")), "causal-lm")
    bundle = pack_bottom(split(loaded.model, 1)[0], loaded.tokenizer)

    return cases_of(
        lambda rng: one_damaged(bundle.files, rng), lambda files: unpack_bottom(Bundle(files))
    )


def heads(scratch: Path) -> Cases:
    """Fuzz bundles with a head."""
    path = str(tiny_model(scratch / "model"))
    loaded = load(path, "sequence-classification", num_labels=3, seed=0)
    bottom, top = split(loaded.model, 1)
    bundle = with_head(pack_bottom(bottom, loaded.tokenizer), detach_head(top))
    own = {n: c for n, c in bundle.files.items() if n.startswith("head")}

    return cases_of(
        lambda rng: {**bundle.files, **one_damaged(own, rng)},
        lambda files: unpack_head(Bundle(files)),
    )


def emulators(scratch: Path) -> Cases:
    """Fuzz emulator folders, their tokenizers included."""
    loaded = load(str(tiny_model(scratch / "model")), "causal-lm")
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    made = make_compressor("magnitude", adapters=(0,), sparsity=0.5).build(
        loaded.model, Material(tokens=tokens, base_digest=loaded.digest)
    )
    whole = scratch / "emulator"
    save_emulator(made, whole, tokenizer=loaded.tokenizer)
    files = {path.name: path.read_bytes() for path in whole.iterdir()}
    return folder_cases(
        scratch / "case",
        lambda rng: one_damaged(files, rng),
        lambda folder: (load_emulator(folder), load_tokenizer(folder)),
    )


def checkpoints(scratch: Path) -> Cases:
    """Fuzz the weights that training left, as serving reads them."""
    path = scratch / "top.safetensors"
    save_trained(path, {"a": torch.ones(3, 2), "b": torch.ones(1)}, {}, {"base": "x"})
    return tensor_file_cases(path, lambda path: load_trained(path, {"base": "x"}))


def states(scratch: Path) -> Cases:
    """Fuzz the states of an interrupted server, with digests that fit."""
    folder = scratch / "state"
    kept = StateFolder(folder, {"model": "x"})
    kept.save({"round": 1, "done": [1, "a"]}, {"a": torch.ones(3)}, {"a/train/rows": torch.ones(2)})
    kept.close()
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    name = next(each for each in files if each.startswith("state-"))
    body = {k: v for k, v in json.loads(files[name]).items() if k != "sha256"}

    def sealed(found: Any) -> Any:
        text = json.dumps(found, sort_keys=True, allow_nan=False).encode()
        return found | {"sha256": hashlib.sha256(text).hexdigest()}

    def draw(rng: random.Random) -> dict[str, bytes]:
        found = dict(files)
        if rng.random() < 0.6:
            found[name] = resealed(body, rng, sealed)
        else:
            which = rng.choice(sorted(n for n in files if n.endswith(".safetensors")))
            found[which] = damaged_safetensors(files[which], rng)
            changed = json.loads(json.dumps(body))
            for entry in (changed["tensors"], *changed["store"]):
                if entry["name"] == which:
                    entry["bytes"] = len(found[which])
                    entry["sha256"] = hashlib.sha256(found[which]).hexdigest()
            found[name] = json.dumps(sealed(changed)).encode()
        return found

    def parse(folder: Path) -> None:
        with contextlib.closing(StateFolder(folder, {"model": "x"})) as reader:
            reader.load()

    return folder_cases(folder, draw, parse)


def adapters(scratch: Path) -> Cases:
    """Fuzz PEFT adapter folders, put on a model."""
    model = load(str(tiny_model(scratch / "model")), "causal-lm").model
    at = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    size = SHAPE["hidden_size"]
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4}
    settings |= {"target_modules": ["layers.0.self_attn.q_proj"], "bias": "none"}
    files = {
        "adapter_config.json": json.dumps(settings).encode(),
        "adapter_model.safetensors": save(
            {f"{at}A.weight": torch.ones(2, size), f"{at}B.weight": torch.ones(size, 2)}
        ),
    }
    folder = scratch / "case"
    fill(folder, files)
    attach_peft(copy.deepcopy(model), folder)
    return folder_cases(
        folder,
        lambda rng: one_damaged(files, rng),
        lambda folder: attach_peft(copy.deepcopy(model), folder),
    )


def transcripts(scratch: Path) -> Cases:
    """Fuzz recorded transcripts, as attacks read them."""
    path = scratch / "transcript.safetensors"
    tensors = {
        "a/train/rows": torch.ones(5, 4),
        "a/train/slots": torch.tensor([0, 1]),
        "a/train/lengths": torch.tensor([3, 2]),
    }
    path.write_bytes(save(tensors))
    return tensor_file_cases(path, read_transcript)


def run_folders(scratch: Path) -> Cases:
    """Fuzz a run's files while they are written, as `watch` shows them."""
    part = {"metrics": {"loss": 0.5, "owners": {"a": {"loss": 0.5}}}, "row_tokens": 5}
    part |= {"finished": ["a"], "lost": {"b": "why"}, "steps": 3, "bytes_up": 100}
    row = {"round": 1, "train": part, "lineage": {"verdict": "in_lineage", "score": 0.9}}
    sound = {
        watch.SERVER: {"rounds": [row], "status": "running", "serving": {"texts": 3}},
        watch.PAGE: {
            "round": 1,
            "rounds": 3,
            "mode": "train",
            "step": 2,
            "steps": 5,
            "bytes_up": 9,
            "steps_per_s": 2.0,
            "step_seconds": {"p50": 0.1, "p99": 0.2},
            "run": "7",
            "owners": [{"name": "a", "state": "connected", "bytes_up": 5}],
            "privacy": {"mechanism": "dchi", "eta": 10.0},
        },
    }
    line = json.dumps({"level": "WARNING", "message": "x", "time": "2026-01-01T00:00:00"})
    (scratch / watch.LOG).write_text(f"{line}\n" * 3)
    console = PlainConsole(io.StringIO(), width=100)

    def draw(rng: random.Random) -> None:
        for name, value in sound.items():
            text = damaged_json(value, rng)
            text = text[: rng.randrange(len(text) + 1)] if rng.random() < 0.2 else text
            (scratch / name).write_bytes(text.encode("utf-8", "surrogatepass"))
        if rng.random() < 0.3:
            (scratch / watch.LOG).write_bytes(flipped(f"{line}\n".encode() * 3, rng))

    def show(_: None) -> None:
        console.print(watch.draw(watch.refresh(watch.View(scratch))))
        console.file = io.StringIO()

    return cases_of(draw, show)
