"""Fuzz cases for files: bundles, emulators, checkpoints, evidence, ledgers, policies, runs."""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich.console import Console
from safetensors.torch import save
from tokenizers import Tokenizer, models, pre_tokenizers

from fedsplit.attacks.transcripts import read_transcript
from fedsplit.emulators import make_compressor
from fedsplit.emulators.compressor import Material
from fedsplit.emulators.files import load_emulator, load_tokenizer, save_emulator
from fedsplit.fingerprints import evidence, public_file
from fedsplit.fingerprints import onnx_generator as onnx_file
from fedsplit.fingerprints.encoder import SHIPPED
from fedsplit.fingerprints.encoder import load as load_encoder
from fedsplit.fingerprints.weights_file import open_view
from fedsplit.models import split
from fedsplit.models.bundle import Bundle, pack_bottom, unpack_bottom
from fedsplit.models.head_bundle import unpack_head, with_head
from fedsplit.models.heads import detach_head
from fedsplit.models.loading import load
from fedsplit.owners.app_digest import digest_of_bundle
from fedsplit.owners.ledger import GENESIS, Ledger, canonical, chained, read_ledger
from fedsplit.owners.policy import Policy
from fedsplit.owners.policy_text import TEMPLATE
from fedsplit.owners.serving_offer import FILE as LEAVE
from fedsplit.owners.serving_offer import take_leave
from simulations import watch
from simulations.bench_fingerprint import write_checkpoint
from simulations.fuzz_damage import damaged_json, damaged_safetensors, damaged_text, flipped
from simulations.fuzz_wire import Case, Cases
from strategies.checkpoint import load_trained, save_trained

SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "vocab_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


def tiny_model(folder: Path) -> Path:
    """Write a LLaMA of three blocks with random weights and a tokenizer of forty words."""
    folder.mkdir(parents=True, exist_ok=True)
    write_checkpoint(folder, SHAPE)
    words = {f"w{i}": i for i in range(39)} | {"[UNK]": 39}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
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


def _one_damaged(files: Mapping[str, bytes], rng: random.Random) -> dict[str, bytes]:
    found = dict(files)
    name = rng.choice(sorted(found))
    if rng.random() < 0.05:
        del found[name]
    else:
        found[name] = damaged_file(name, found[name], rng)
    return found


def bottoms(scratch: Path) -> Cases:
    """Bottom bundles that a server sends, with the right digest."""
    loaded = load(str(tiny_model(scratch / "model")), "causal-lm")
    bundle = pack_bottom(split(loaded.model, 1)[0], loaded.tokenizer)

    def draw(rng: random.Random) -> Case:
        files = _one_damaged(bundle.files, rng)
        return lambda: unpack_bottom(Bundle(files))

    return draw


def heads(scratch: Path) -> Cases:
    """Bundles with a head."""
    loaded = load(
        str(tiny_model(scratch / "model")), "sequence-classification", num_labels=3, seed=0
    )
    bottom, top = split(loaded.model, 1)
    bundle = with_head(pack_bottom(bottom, loaded.tokenizer), detach_head(top))
    own = {n: c for n, c in bundle.files.items() if n.startswith("head")}

    def draw(rng: random.Random) -> Case:
        files = {**bundle.files, **_one_damaged(own, rng)}
        return lambda: unpack_head(Bundle(files))

    return draw


def emulators(scratch: Path) -> Cases:
    """Emulator folders, their tokenizers included."""
    loaded = load(str(tiny_model(scratch / "model")), "causal-lm")
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    made = make_compressor("magnitude", adapters=(0,), sparsity=0.5).build(
        loaded.model, Material(tokens=tokens, base_digest=loaded.digest)
    )
    whole = scratch / "emulator"
    save_emulator(made, whole, tokenizer=loaded.tokenizer)
    files = {path.name: path.read_bytes() for path in whole.iterdir()}
    folder = scratch / "case"

    def draw(rng: random.Random) -> Case:
        _fill(folder, _one_damaged(files, rng))

        def case() -> None:
            load_emulator(folder)
            load_tokenizer(folder)

        return case

    return draw


def checkpoints(scratch: Path) -> Cases:
    """What training left, as serving reads it."""
    path = scratch / "top.safetensors"
    save_trained(path, {"a": torch.ones(3, 2), "b": torch.ones(1)}, None, {"base": "x"})
    sound = path.read_bytes()

    def draw(rng: random.Random) -> Case:
        path.write_bytes(damaged_safetensors(sound, rng))
        return lambda: load_trained(path, {"base": "x"})

    return draw


def weight_folders(scratch: Path) -> Cases:
    """A suspect's checkpoint, viewed without loading it."""
    folder = tiny_model(scratch / "model")
    files = {p.name: p.read_bytes() for p in folder.iterdir() if "tokenizer" not in p.name}
    target = scratch / "case"

    def draw(rng: random.Random) -> Case:
        _fill(target, _one_damaged(files, rng))

        def case() -> None:
            view = open_view(target)
            view.embeddings([0, 1])

        return case

    return draw


def encoders(scratch: Path) -> Cases:
    """Encoder weights."""
    sound, path = Path(SHIPPED).read_bytes(), scratch / "encoder.safetensors"

    def draw(rng: random.Random) -> Case:
        path.write_bytes(damaged_safetensors(sound, rng))
        return lambda: load_encoder(path)

    return draw


def generators(scratch: Path) -> Cases:
    """ONNX generators."""
    import numpy as np
    import onnx

    helper = onnx.helper
    weights = onnx.numpy_helper.from_array(np.ones((512, 12), dtype=np.float32), "w")
    shape = onnx.numpy_helper.from_array(np.array([1, 3, 2, 2]), "s")
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["z", "w"], ["flat"]),
            helper.make_node("Reshape", ["flat", "s"], ["image"]),
        ],
        "generator",
        [helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, [1, 512])],
        [helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, [1, 3, 2, 2])],
        [weights, shape],
    )
    opsets = [helper.make_opsetid("", 17)]
    sound = helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    path = scratch / "generator.onnx"

    def draw(rng: random.Random) -> Case:
        data = flipped(sound, rng)
        if rng.random() < 0.5:  # in the program, not in the weights
            cut = data.find(b"generator")
            data = flipped(sound[: max(200, cut)], rng) + sound[max(200, cut) :]
        path.write_bytes(data)
        return lambda: onnx_file.OnnxGenerator(path)

    return draw


def evidences(scratch: Path) -> Cases:
    """Lineage evidence, with a hostile signer's own good signatures."""
    key, path = Ed25519PrivateKey.generate(), scratch / "lineage.jsonl"
    body: dict[str, Any] = {
        "version": 1,
        "round": 1,
        "subject": "aggregate",
        "action": "accept",
        "weights": "ab",
        "previous": "0" * 64,
        "signer": key.public_key().public_bytes_raw().hex(),
        "report": {"verdict": "in_lineage", "score": 0.9},
        "details": {"x": [1, "y"]},
    }

    def signed(found: Any) -> Any:
        digest = hashlib.sha256(public_file.canonical_json(found)).hexdigest()
        return found | {"hash": digest, "signature": key.sign(bytes.fromhex(digest)).hex()}

    sound = json.dumps(signed(dict(body))).encode() + b"\n"

    def draw(rng: random.Random) -> Case:
        data = _resealed(body, rng, signed) if rng.random() < 0.7 else flipped(sound, rng)
        path.write_bytes(data + rng.choice((b"\n", b"", sound, b"\0")))

        def case() -> None:
            try:
                evidence.verify(path)
            finally:
                evidence.last_hash(path)

        return case

    return draw


def fingerprints(scratch: Path) -> Cases:
    """Published fingerprint files, signed by whoever made them."""
    key, path = Ed25519PrivateKey.generate(), scratch / "fingerprint.json"
    view = open_view(tiny_model(scratch / "model"))
    public_file.write(public_file.make(view, "m", size=4), path, key)
    sound = path.read_bytes()
    body = {k: v for k, v in json.loads(sound).items() if k != "signature"}

    def signed(found: Any) -> Any:
        return found | {"signature": key.sign(public_file.canonical_json(found)).hex()}

    def draw(rng: random.Random) -> Case:
        path.write_bytes(
            _resealed(body, rng, signed) if rng.random() < 0.7 else flipped(sound, rng)
        )

        def case() -> None:
            found = public_file.read(path)
            public_file.compare_public(found, view)

        return case

    return draw


def ledgers(scratch: Path) -> Cases:
    """An owner's ledger with lines that are damaged, cut off, or another's with good hashes."""
    folder = scratch / "home"
    folder.mkdir(exist_ok=True)
    with Ledger(folder) as ledger:
        for kind in ("hello", "ready", "slots"):
            ledger.append(
                lambda totals, kind=kind: {"kind": kind, "bytes": 3, "run": "7", "owner": "a"}
            )
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    first = json.loads(files["ledger.jsonl"].splitlines()[0])
    body = {k: v for k, v in first.items() if k != "hash"}

    def hashed(found: Any) -> Any:
        return found | {"hash": chained(GENESIS, canonical(found))}

    def draw(rng: random.Random) -> Case:
        found = dict(files)
        way = rng.randrange(3)
        if way == 0:
            found["ledger.jsonl"] = flipped(found["ledger.jsonl"], rng)
        elif way == 1:
            line = _resealed(body, rng, hashed, compact=True)
            found = {"ledger.jsonl": line + b"\n"}
        else:
            name = rng.choice(sorted(found))
            found[name] = flipped(found[name], rng)
        _fill(folder, found)

        def case() -> None:
            try:
                for _ in read_ledger(folder):
                    pass
            finally:
                Ledger(folder).close()

        return case

    return draw


def policies(_: Path) -> Cases:
    """owner.toml."""
    sound = re.sub(r"(?m)^# (?=\w+ = )", "", TEMPLATE)  # with its suggestions in force
    sound = sound.replace("...", "ab" * 32)
    Policy.parse(sound.encode(), "owner.toml")

    def draw(rng: random.Random) -> Case:
        text = damaged_text(sound, rng)
        content = text.encode("utf-8", "surrogatepass")
        if rng.random() < 0.2:
            content = flipped(sound.encode(), rng)
        return lambda: Policy.parse(content, "owner.toml")

    return draw


def leaves(scratch: Path) -> Cases:
    """An owner's kept offer of a serving model."""
    from fedsplit.config import RunConfig
    from fedsplit.owners.serving_offer import keep_offer
    from fedsplit.wire.messages import SessionOffer
    from fedsplit.wire.serving import ServingOffer

    session = SessionOffer(7, 5, 0, "predict", "stream", "", "127.0.0.1:1", b"", "", "ab")
    keep_offer(scratch, ServingOffer(session, ("a.1.b",)), RunConfig().to_flat(), {"x": 1})
    sound = json.loads((scratch / LEAVE).read_bytes())

    def draw(rng: random.Random) -> Case:
        text = damaged_json(sound, rng)
        (scratch / LEAVE).write_bytes(text.encode("utf-8", "surrogatepass"))
        return lambda: take_leave(scratch)

    return draw


def apps(_: Path) -> Cases:
    """App bundles, whose digest an owner compares."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("pyproject.toml", "[project]\n" * 20)
        archive.writestr("strategies/x.py", "x = 1\n" * 50)
    sound = packed.getvalue()

    def draw(rng: random.Random) -> Case:
        data = flipped(sound, rng)
        return lambda: digest_of_bundle(data)

    return draw


def transcripts(scratch: Path) -> Cases:
    """Recorded transcripts, as attacks read them."""
    path = scratch / "transcript.safetensors"
    tensors = {
        "a/train/rows": torch.ones(5, 4),
        "a/train/slots": torch.tensor([0, 1]),
        "a/train/lengths": torch.tensor([3, 2]),
    }
    sound = save(tensors)

    def draw(rng: random.Random) -> Case:
        path.write_bytes(damaged_safetensors(sound, rng))
        return lambda: read_transcript(path)

    return draw


def run_folders(scratch: Path) -> Cases:
    """A run's files while they are written, as `watch` shows them."""
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
    console = Console(file=io.StringIO(), width=100)

    def draw(rng: random.Random) -> Case:
        for name, value in sound.items():
            text = damaged_json(value, rng)
            text = text[: rng.randrange(len(text) + 1)] if rng.random() < 0.2 else text
            (scratch / name).write_bytes(text.encode("utf-8", "surrogatepass"))
        if rng.random() < 0.3:
            (scratch / watch.LOG).write_bytes(flipped(f"{line}\n".encode() * 3, rng))

        def case() -> None:
            console.print(watch.draw(watch.refresh(watch.View(scratch))))
            console.file = io.StringIO()

        return case

    return draw


def _resealed(
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


def _fill(folder: Path, files: Mapping[str, bytes]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
