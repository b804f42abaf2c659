"""Fuzz cases for lineage: suspects' checkpoints, evidence, fingerprints, encoders, generators."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedsplit.fingerprints.evidence import chain as evidence
from fedsplit.fingerprints.evidence import public_file
from fedsplit.fingerprints.portraits import onnx_generator as onnx_file
from fedsplit.fingerprints.portraits.encoder import SHIPPED
from fedsplit.fingerprints.portraits.encoder import load as load_encoder
from fedsplit.fingerprints.weights_file import open_view
from simulations.fuzz.cases import (
    Cases,
    file_cases,
    folder_cases,
    one_damaged,
    resealed,
    tensor_file_cases,
    tiny_model,
)
from simulations.fuzz.damage import flipped


def weight_folders(scratch: Path) -> Cases:
    """Fuzz a suspect's checkpoint, viewed without loading it."""
    folder = tiny_model(scratch / "model")
    files = {p.name: p.read_bytes() for p in folder.iterdir() if "tokenizer" not in p.name}
    return folder_cases(
        scratch / "case",
        lambda rng: one_damaged(files, rng),
        lambda folder: open_view(folder).embeddings([0, 1]),
    )


def encoders(scratch: Path) -> Cases:
    """Fuzz encoder weights."""
    path = scratch / "encoder.safetensors"
    path.write_bytes(Path(SHIPPED).read_bytes())
    return tensor_file_cases(path, load_encoder)


def generators(scratch: Path) -> Cases:
    """Fuzz ONNX generators."""
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

    def draw(rng: random.Random) -> bytes:
        data = flipped(sound, rng)
        if rng.random() < 0.5:  # in the program, not in the weights
            cut = data.find(b"generator")
            data = flipped(sound[: max(200, cut)], rng) + sound[max(200, cut) :]
        return data

    return file_cases(scratch / "generator.onnx", draw, onnx_file.OnnxGenerator)


def evidences(scratch: Path) -> Cases:
    """Fuzz lineage evidence, with a hostile signer's own good signatures."""
    key = Ed25519PrivateKey.generate()
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

    def draw(rng: random.Random) -> bytes:
        data = resealed(body, rng, signed) if rng.random() < 0.7 else flipped(sound, rng)
        return data + rng.choice((b"\n", b"", sound, b"\0"))

    return file_cases(scratch / "lineage.jsonl", draw, evidence.verify)


def fingerprints(scratch: Path) -> Cases:
    """Fuzz published fingerprint files, signed by whoever made them."""
    key, path = Ed25519PrivateKey.generate(), scratch / "fingerprint.json"
    view = open_view(tiny_model(scratch / "model"))
    public_file.write(public_file.make(view, "m", size=4), path, key)
    sound = path.read_bytes()
    body = {k: v for k, v in json.loads(sound).items() if k != "signature"}

    def signed(found: Any) -> Any:
        return found | {"signature": key.sign(public_file.canonical_json(found)).hex()}

    return file_cases(
        path,
        lambda rng: resealed(body, rng, signed) if rng.random() < 0.7 else flipped(sound, rng),
        lambda path: public_file.compare_public(public_file.read(path), view),
    )
